"""Run folders: what is saved comes back to the bit, and neither a crash, a full disk nor a flipped bit loses a run."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nanoqwen import runfolder
from nanoqwen.errors import BusyError, DiskError
from nanoqwen.files import write_atomic
from nanoqwen.runfolder import (
    check_disk,
    digest,
    load_trainer_state,
    lock,
    newest_valid,
    save,
    source_record,
    verify,
    write_status,
)
from nanoqwen.tokenizer import Tokenizer, load_tokenizer
from nanoqwen.weights import CheckpointError, load_model

ROOT = Path(__file__).parents[1]
SHAPE = {"vocab_size": 260, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
FILES = {
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "optimizer.safetensors",
    "state.json",
    "manifest.json",
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer("bytes")


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is warned of. A test that does not ask for it fails at a warning."""
    texts: list[str] = []
    monkeypatch.setattr(runfolder, "warn", texts.append)
    return texts


@pytest.fixture(autouse=True)
def no_warnings(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "warnings" not in request.fixturenames:
        monkeypatch.setattr(runfolder, "warn", pytest.fail)


def optimizer_of(gpt: torch.nn.Module, step: int) -> dict[str, torch.Tensor]:
    """Made-up AdamW moments, with the 0-d step that torch keeps per parameter."""
    draw = torch.Generator().manual_seed(step)
    tensors = {}
    for name, parameter in gpt.named_parameters():
        tensors[f"{name}.step"] = torch.tensor(float(step))
        for slot in ("exp_avg", "exp_avg_sq"):
            tensors[f"{name}.{slot}"] = torch.randn(parameter.shape, generator=draw)
    return tensors


def trainer_state(step: int) -> dict:
    rng = torch.Generator().manual_seed(step).get_state()
    return {"cursor": step * 8, "lr": 1e-3 / (step + 1), "rng": {"cpu": bytes(rng.tolist()).hex()}, "scaler": {}}


def write(run: Path, step: int, tokenizer: Tokenizer | None = None, keep: int = 9, **more) -> tuple[Path, str]:
    gpt = tiny.model(seed=step, **SHAPE)
    values = {"optimizer": optimizer_of(gpt, step), "state": trainer_state(step)} | more
    return save(run, step, model=gpt, tokenizer=tokenizer, keep=keep, **values)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A run with checkpoints of steps 5 and 10; to be copied."""
    run = tmp_path_factory.mktemp("run") / "base"
    write(run, 5, tokenizer)
    write(run, 10, tokenizer)
    return run


@pytest.fixture
def run(originals: Path, tmp_path: Path) -> Path:
    return shutil.copytree(originals, tmp_path / "base")


def at(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def steps(run: Path) -> list[int]:
    """Of the checkpoints that are there; anything else there is a fault."""
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert all(re.fullmatch(r"step-\d{8}", name) for name in names), names
    return [int(name.removeprefix("step-")) for name in names]


def sign(folder: Path) -> None:
    """A manifest that agrees with whatever is there."""
    files = [path for path in folder.iterdir() if path.name != "manifest.json"]
    listed = {f.name: {"size": f.stat().st_size, "sha256": hashlib.sha256(f.read_bytes()).hexdigest()} for f in files}
    (folder / "manifest.json").write_text(json.dumps({"files": listed}))


# --- there and back ---------------------------------------------------------------------------------------------------


def test_everything_comes_back_to_the_bit(tmp_path: Path, tokenizer: Tokenizer):
    gpt = tiny.model(**SHAPE)
    shared = torch.randn(4, 4)
    optimizer = optimizer_of(gpt, 3) | {
        "half": torch.randn(3, 5).bfloat16(),
        "transposed": torch.randn(3, 5).t(),
        "first": shared,
        "second": shared,
        "row": shared[1],
        "count": torch.tensor(2**40 + 1),
        "none": torch.empty(0, 3),
        "tiniest": torch.tensor([-0.0, 1e-45]),
    }
    state = trainer_state(3) | {"best": {"step": None, "loss": float("inf")}, "lr": 0.1 + 0.2}
    folder, new_digest = save(
        tmp_path / "runs/a", 3, model=gpt, tokenizer=tokenizer, optimizer=optimizer, state=state, keep=1
    )
    assert folder == at(tmp_path / "runs/a", 3)
    assert {path.name for path in folder.iterdir()} == FILES
    assert verify(folder) == verify(tmp_path / "runs/a") == digest(folder) == new_digest

    stored, read_tokenizer = load_model(folder)
    assert all(torch.equal(a, b) for a, b in zip(gpt.state_dict().values(), stored.state_dict().values(), strict=True))
    assert read_tokenizer.hash == tokenizer.hash
    tensors, read = load_trainer_state(folder)
    assert tensors.keys() == optimizer.keys()
    for name, tensor in optimizer.items():
        assert (tensors[name].dtype, tensors[name].shape) == (tensor.dtype, tensor.shape)
        assert tensors[name].contiguous().view(-1).view(torch.uint8).tolist() == (
            tensor.contiguous().view(-1).view(torch.uint8).tolist()
        ), name
    assert {key: read[key] for key in state} == state
    assert (read["format"], read["step"], read["tokenizer_hash"]) == (2, 3, tokenizer.hash)
    assert read["versions"]["torch"] == torch.__version__


def test_the_digest_is_of_the_state_not_of_the_place(tmp_path: Path, run: Path, tokenizer: Tokenizer):
    _, again = write(tmp_path / "elsewhere", 5, tokenizer, state=trainer_state(5) | {"versions": {"torch": "9.9"}})
    assert again == verify(at(run, 5))


@pytest.mark.parametrize("changed", ["step", "lr", "cursor", "rng", "weight", "moment", "name"])
def test_the_digest_tells_what_changed(run: Path, tmp_path: Path, changed: str):
    gpt = tiny.model(seed=5, **SHAPE)
    optimizer, state = optimizer_of(gpt, 5), trainer_state(5)
    if changed == "weight":
        with torch.no_grad():
            next(gpt.parameters()).view(-1)[0] += 1
    elif changed == "moment":
        optimizer["model.norm.weight.step"] += 1
    elif changed == "name":
        optimizer["renamed"] = optimizer.pop("model.norm.weight.step")
    else:
        state[changed] = 1
    more = {"optimizer": optimizer, "state": state, "keep": 1, "tokenizer": None}
    _, new_digest = save(tmp_path / "other", 6 if changed == "step" else 5, model=gpt, **more)
    assert new_digest != digest(at(run, 5))


def test_transformers_loads_the_folder(run: Path):
    transformers = pytest.importorskip("transformers")
    ours, _ = load_model(at(run, 10))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(at(run, 10), dtype=torch.float32).eval()
    tokens = torch.randint(SHAPE["vocab_size"], (2, 16))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=0, atol=1e-4)
    text = "def f(x): return x"
    assert load_tokenizer(at(run, 10)).encode(text) == transformers.AutoTokenizer.from_pretrained(at(run, 10)).encode(
        text
    )


def test_a_function_may_write_the_weights(tmp_path: Path):
    weights = {"w": torch.arange(6.0).view(2, 3)}
    folder, new_digest = save(
        tmp_path / "run",
        2,
        model=lambda folder: save_file(weights, folder / "adapter_model.safetensors"),
        tokenizer=None,
        optimizer={"w": torch.ones(2, 3)},  # a parameter's own name: parts do not mix
        state={},
        keep=1,
    )
    assert verify(folder) == new_digest
    assert load_trainer_state(folder)[0]["w"].tolist() == torch.ones(2, 3).tolist()


def test_c06_newest_and_best_stay(tmp_path: Path):
    run = tmp_path / "run"
    for step in range(1, 9):
        write(run, step, keep=2, best=3 if step >= 3 else None)
        write(run, step, keep=2, best=3 if step >= 3 else None)  # twice, as after a signal: still one
        expected = {step, step - 1} - {0} | ({3} if step >= 3 else set())
        assert steps(run) == sorted(expected)
    write(run, 9, keep=1)
    assert steps(run) == [9]


def test_keep_counts_whole_checkpoints_and_leaves_later_ones_alone(run: Path):
    (at(run, 10) / "model.safetensors").write_bytes(b"")
    write(run, 7, keep=2)
    assert steps(run) == [5, 7, 10]
    write(run, 12, keep=2)
    assert steps(run) == [7, 12]


def test_a_damaged_checkpoint_is_written_again(run: Path, tokenizer: Tokenizer):
    (at(run, 10) / "model.safetensors").write_bytes(b"")
    folder, new_digest = write(run, 10, tokenizer)
    assert steps(run) == [5, 10]
    assert verify(folder) == new_digest


def test_the_step_decides_not_the_time(run: Path):
    for path in [at(run, 5), *at(run, 5).iterdir()]:
        os.utime(path, (2**31, 2**31))
    assert newest_valid(run) == at(run, 10)


def test_no_checkpoint_at_all_is_none(tmp_path: Path):
    assert newest_valid(tmp_path / "run") is None
    (tmp_path / "checkpoints" / ".tmp-0123").mkdir(parents=True)
    assert newest_valid(tmp_path) is None
    with pytest.raises(CheckpointError, match="no checkpoint"):
        verify(tmp_path)
    with pytest.raises(CheckpointError, match=r"manifest\.json: missing"):
        verify(tmp_path / "checkpoints")


# --- damage -----------------------------------------------------------------------------------------------------------

DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "empty": lambda data: b"",
    "one byte": lambda data: data[:1],
    "half": lambda data: data[: len(data) // 2],
    "one less": lambda data: data[:-1],
    "one more": lambda data: data + b"\0",
    "absent": lambda data: None,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", sorted(FILES))
def test_c1_a_damaged_checkpoint_is_ignored_with_one_warning(run: Path, name: str, damage: str, warnings: list[str]):
    for step in (10, 5):
        file = at(run, step) / name
        broken = DAMAGES[damage](file.read_bytes())
        if broken is None:
            file.unlink()
        else:
            file.write_bytes(broken)
        before = tree(run)
        if step == 10:
            assert newest_valid(run) == at(run, 5)
            assert len(warnings) == 1
            assert f"{at(run, 10) / name}" in warnings[0]
        else:
            with pytest.raises(CheckpointError, match="none of its 2 checkpoints") as error:
                newest_valid(run)
            assert error.value.exit_code == 4
            assert len(warnings) == 2
        warnings.clear()
        with pytest.raises(CheckpointError, match=re.escape(name)):
            verify(at(run, step))
        assert tree(run) == before


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"") for p in folder.rglob("*")}


def test_c1_an_empty_folder_is_damage_too(run: Path, warnings: list[str]):
    at(run, 11).mkdir()
    assert newest_valid(run) == at(run, 10)
    assert len(warnings) == 1


def test_c2_every_flipped_bit_is_found(run: Path):
    files = sorted(at(run, 10).iterdir())
    sizes = [file.stat().st_size for file in files]
    draw = random.Random(0)
    manifest = files.index(at(run, 10) / "manifest.json")
    places = [(*draw.choices(range(len(files)), sizes), draw.random()) for _ in range(200)]
    places += [(manifest, draw.random()) for _ in range(100)]  # the file that nothing else vouches for
    for index, where in places:
        data = bytearray(files[index].read_bytes())
        clean = bytes(data)
        data[int(where * len(data))] ^= 1 << draw.randrange(8)
        files[index].write_bytes(data)
        with pytest.raises(CheckpointError):
            verify(at(run, 10))
        files[index].write_bytes(clean)
    verify(at(run, 10))


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("change", ["missing", "extra", "prefix", "shape", "dtype"])
def test_c4_other_tensors_under_a_right_checksum(run: Path, file: str, change: str):
    path = at(run, 10) / file
    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if "q_proj.weight" in name)
    if change == "missing":
        del tensors[name]
    elif change == "extra":
        tensors["extra"] = torch.zeros(2)
    elif change == "prefix":
        tensors = {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}
        name = "_orig_mod."
    elif change == "shape":
        tensors[name] = tensors[name][:-1].contiguous()
    else:
        tensors[name] = tensors[name].double()
    save_file(tensors, path)
    sign(at(run, 10))
    for check in (verify, load_trainer_state, digest):
        with pytest.raises(CheckpointError, match="extra" if change == "extra" else re.escape(name)):
            check(at(run, 10))


def test_c4_another_order_is_the_same_checkpoint(run: Path):
    before = verify(at(run, 10))
    path = at(run, 10) / "optimizer.safetensors"
    save_file(dict(reversed(load_file(path).items())), path)
    sign(at(run, 10))
    assert verify(at(run, 10)) == before


def edit(folder: Path, **changes) -> None:
    state = json.loads((folder / "state.json").read_text()) | changes
    (folder / "state.json").write_text(json.dumps({key: value for key, value in state.items() if value is not ...}))
    sign(folder)


@pytest.mark.parametrize(
    ("value", "message"),
    [(1, "older version"), (3, "newer version"), (..., "got none"), ("1", "got '1'"), (True, "got True")],
)
def test_c6_another_format_stops_even_beside_an_older_checkpoint(run: Path, value: object, message: str):
    edit(at(run, 10), format=value)
    for check in (verify, load_trainer_state, lambda folder: newest_valid(run)):
        with pytest.raises(CheckpointError, match=message) as error:
            check(at(run, 10))
        assert error.value.exit_code == 4


@pytest.mark.parametrize("changes", [{"step": ...}, {"step": "10"}, {"step": 11}, {"tensors": ...}, {"tensors": []}])
def test_c4_a_state_without_its_step_or_tensors(run: Path, changes: dict):
    edit(at(run, 10), **changes)
    with pytest.raises(CheckpointError, match="step"):
        verify(at(run, 10))


@pytest.mark.parametrize(
    "manifest",
    [
        "[]",
        "{}",
        '{"files": []}',
        '{"files": {}}',
        '{"files": {"model.safetensors": 1}}',
        '{"files": {"../../../etc/hostname": {"size": 1, "sha256": ""}}}',
        '{"files": {"/etc/hostname": {"size": 1, "sha256": ""}}}',
        '{"files": {"a\\u0000b": {"size": 1, "sha256": ""}}}',
        '{"files": {"": {"size": 1, "sha256": ""}}}',
        "[" * 200_000,
        '{"files": ' + "9" * 5_000 + "}",
        "\ud800",
    ],
    ids=range(12),
)
def test_a_manifest_that_makes_no_sense(run: Path, manifest: str):
    (at(run, 10) / "manifest.json").write_bytes(manifest.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError):
        verify(at(run, 10))


def test_a_file_beside_the_others(run: Path):
    (at(run, 10) / "README.md").write_text("mine")
    verify(at(run, 10))
    (at(run, 10) / "model.safetensors.index.json").write_text("{}")  # a loader would prefer it
    with pytest.raises(CheckpointError, match=r"index\.json: not part of"):
        verify(at(run, 10))


class Canary:
    """A pickle of this makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name", sorted(FILES))
def test_s1_a_pickle_is_never_run(run: Path, tmp_path: Path, name: str, warnings: list[str]):
    canary = tmp_path / "canary"
    shutil.rmtree(at(run, 5))
    (at(run, 10) / name).write_bytes(pickle.dumps(Canary(canary)))
    if name != "manifest.json":
        sign(at(run, 10))

    def use() -> None:
        newest = newest_valid(run)
        load_trainer_state(newest)
        load_model(newest)

    with pytest.raises(CheckpointError):
        use()
    assert not canary.exists()


# --- crashes ----------------------------------------------------------------------------------------------------------

# In a forked child a save is killed, or gets the error of a full disk, at its k-th file operation, for every k. Python
# announces each open, mkdir, rename, remove, chmod and listdir to an audit hook before it happens.
CRASHES = """
import os, shutil, signal, sys
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
import test_runfolder as t
from nanoqwen import runfolder

base, work = Path(sys.argv[3]), Path(sys.argv[4])
tokenizer, gpt = t.load_tokenizer("bytes"), t.tiny.model(seed=15, **t.SHAPE)

os.fsync = lambda descriptor: None  # nobody pulls the plug here
runfolder.warn = lambda text: None

def write(run, step):
    runfolder.save(run, step, model=gpt, tokenizer=tokenizer, optimizer=t.optimizer_of(gpt, step),
                   state=t.trainer_state(step), keep=2)

def faulty_write(run, step, k, fault):
    count = 0
    def hook(event, args):
        nonlocal count
        count += event.startswith(("open", "os.", "shutil."))
        if event.startswith(("open", "os.", "shutil.")) and count == k:
            if fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(28, "No space left on device")
    sys.addaudithook(hook)
    try:
        write(run, step)
    except runfolder.DiskError as error:
        assert "No space left" in str(error) and "needed" in str(error), error
        os._exit(6)
    os._exit(0 if count >= k else 100)

# 15: a new checkpoint; 10: one that takes the place of another.
for fault, step in (("kill", 15), ("kill", 10), ("full", 15), ("full", 10)):
    before = runfolder.verify(t.at(base, 10))
    for k in range(1, 1000, int(sys.argv[5])):
        run = work / f"{step}-{k}"
        shutil.copytree(base, run)
        pid = os.fork()
        if not pid:
            faulty_write(run, step, k, fault)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in ((-9, 100) if fault == "kill" else (0, 6, 100)), (step, k, code)
        runfolder.warn = lambda text: sys.exit(f"{step}, {k}: {text}")
        newest = runfolder.newest_valid(run)
        number = int(newest.name[-8:])
        assert number == step or runfolder.verify(newest) == before, (step, k)
        assert number == step or code != 0, (step, k)
        names = [path.name for path in (run / "checkpoints").iterdir()]
        assert code != 6 or not any(name.startswith(".tmp") for name in names), (step, k, names)
        runfolder.warn = lambda text: None
        write(run, 20)
        runfolder.warn = sys.exit
        assert t.steps(run)[-1:] == [20] and runfolder.newest_valid(run) == t.at(run, 20), (step, k)
        runfolder.warn = lambda text: None
        shutil.rmtree(run)
        if code == 100:
            print(k)
            break
"""


@pytest.mark.parametrize("stride", [6, pytest.param(1, marks=pytest.mark.slow)])
def test_c07_a_save_may_break_off_anywhere(originals: Path, tmp_path: Path, stride: int):
    paths = [str(path) for path in (ROOT, ROOT / "tests", originals, tmp_path)]
    command = [sys.executable, "-c", CRASHES, *paths, str(stride)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    points = [int(number) for number in result.stdout.split()]
    assert len(points) == 4
    assert min(points) > 50, points


SAVE_IN_PLACE = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
import test_runfolder as t
for step in map(int, sys.argv[4:]):
    print("CKPT " + str(t.write(Path(sys.argv[3]), step, t.load_tokenizer("bytes"), keep=2)[0]), flush=True)
"""


def save_command(run: Path, *steps: int) -> list[str]:
    script = [sys.executable, "-c", SAVE_IN_PLACE, str(ROOT), str(ROOT / "tests"), str(run)]
    return [*script, *map(str, steps)]


needs_strace = pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")


@needs_strace
@pytest.mark.slow
@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir", "rmdir", "unlinkat", "chmod"])
def test_a3_a_kill_at_a_system_call(originals: Path, tmp_path: Path, call: str):
    """As the kernel sees it, files that are written by other languages included."""
    killed = 0
    for k in range(1, 100):
        run = shutil.copytree(originals, tmp_path / f"{call}-{k}")
        inject = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"inject={call}:signal=SIGKILL:when={k}"]
        code = subprocess.run([*inject, *save_command(run, 15)], capture_output=True, timeout=60).returncode
        newest = newest_valid(run)
        assert newest == at(run, 15) or (newest == at(run, 10) and code), (k, code)
        write(run, 20, keep=2)
        assert steps(run)[-1] == 20
        if not code:
            break
        killed += 1
    assert killed >= (1 if call in ("rename", "rmdir") else 2), killed


@needs_strace
def test_a4_synced_then_renamed_then_synced(originals: Path, tmp_path: Path):
    run, log = shutil.copytree(originals, tmp_path / "base"), tmp_path / "log"
    calls = "openat,fsync,rename,unlink,unlinkat,rmdir,write"
    trace = ["strace", "-f", "-y", "-qq", "-s", "300", "-e", f"trace={calls}", "-o", str(log)]
    subprocess.run([*trace, *save_command(run, 15, 20, 25)], check=True, capture_output=True)
    lines = log.read_text().splitlines()
    renames = [n for n, line in enumerate(lines) if re.search(r'rename\(".*/\.tmp-.*/step-\d+"\)', line)]
    assert len(renames) == 3
    for step, n in zip((15, 20, 25), renames, strict=True):
        unfinished = re.search(r'"([^"]*/\.tmp-\w+)"', lines[n])[1]
        for name in FILES:
            synced = [i for i in range(n) if re.search(rf"fsync\(\d+<{unfinished}/{name}>\) += 0", lines[i])]
            written = [i for i in range(n) if re.search(rf"write\(\d+<{unfinished}/{name}>", lines[i])]
            assert synced, name
            assert max(written, default=-1) < max(synced), name  # none: written under another name
        manifest = max(i for i in range(n) if re.search(rf"fsync\(\d+<{unfinished}/manifest.json>", lines[i]))
        assert any(re.search(rf"fsync\(\d+<{unfinished}>\) += 0", lines[i]) for i in range(manifest, n))
        assert re.search(rf"fsync\(\d+<{run}/checkpoints>\) += 0", " ".join(lines[n + 1 : n + 4]))
        printed = next(i for i in range(n, len(lines)) if f'"CKPT {at(run, step)}' in lines[i])
        deleted = [i for i in range(n, printed) if re.search(r'(rename\(".*"\.?.*/\.del-|unlink)', lines[i])]
        assert deleted
        assert min(deleted) > n + 2
    assert steps(run) == [20, 25]


def test_b7_deletes_that_fail_are_warned_of(run: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]):

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        folder, saved = write(run, 15, keep=1)
    assert verify(folder) == saved
    assert len(warnings) == 2
    assert all("Operation not permitted" in text for text in warnings)
    write(run, 20, keep=1)
    assert len(warnings) == 2
    assert steps(run) == [20]


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("chattr"), reason="needs root and chattr")
def test_b7_an_immutable_checkpoint(run: Path, warnings: list[str]):
    if subprocess.run(["chattr", "+i", str(at(run, 5))], capture_output=True).returncode:
        pytest.skip("this file system has no immutable files")
    try:
        write(run, 15, keep=1)
        assert len(warnings) == 1
        assert steps(run) == [5, 15]
    finally:
        subprocess.run(["chattr", "-i", str(at(run, 5))], check=True)


@pytest.mark.parametrize("where", ["weight", "moment", "state"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_not_saved(run: Path, where: str, value: float):
    gpt = tiny.model(**SHAPE)
    optimizer, state = optimizer_of(gpt, 15), trainer_state(15)
    if where == "weight":
        with torch.no_grad():
            next(gpt.parameters()).view(-1)[7] = value
    elif where == "moment":
        optimizer["model.norm.weight.exp_avg"][3] = value
    else:
        state["plateau"] = {"seen": [1.0, float("nan")]}
    with pytest.raises(FloatingPointError, match=r"step 15.*nothing was saved") as error:
        save(run, 15, model=gpt, tokenizer=None, optimizer=optimizer, state=state, keep=1)
    assert error.value.exit_code == 7
    assert steps(run) == [5, 10]


# --- the disk ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A file system of a given size."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        path = tmp_path / "disk"
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(path)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("cannot mount a file system here")
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", str(path)], check=True)


def test_b1_a_full_disk(small_disk: Callable[[str], Path], originals: Path, tokenizer: Tokenizer):
    size = sum(path.stat().st_size for path in at(originals, 5).iterdir())
    disk = small_disk(f"size={int(size * 2.5) // 4096 * 4096}")
    run = disk / "base"
    digests = {step: write(run, step, tokenizer, keep=2)[1] for step in (5, 10)}
    with pytest.raises(
        DiskError, match=r"checkpoints: No space left on device.*needed [\d,]+ bytes, free are"
    ) as error:
        write(run, 15, tokenizer, keep=2)
    assert error.value.exit_code == 6
    assert steps(run) == [5, 10]
    assert {step: verify(at(run, step)) for step in (5, 10)} == digests
    with pytest.raises(DiskError, match="3 checkpoints need"):
        check_disk(run, size, 2)
    subprocess.run(["mount", "-o", f"remount,size={size * 4}", str(disk)], check=True)
    check_disk(run, size, 2)
    write(run, 15, tokenizer, keep=2)
    assert steps(run) == [10, 15]


def test_b1_no_room_at_any_size(small_disk: Callable[[str], Path], originals: Path, tokenizer: Tokenizer):
    """Wherever within a save the disk becomes full, it is the same error."""
    size = sum(path.stat().st_size for path in at(originals, 5).iterdir())
    disk = small_disk("size=4k")
    for share in range(1, 20):
        subprocess.run(["mount", "-o", f"remount,size={size * share // 20}", str(disk)], check=True)
        with pytest.raises(DiskError):
            write(disk / "base", 5, tokenizer)
        assert steps(disk / "base") == [] if (disk / "base/checkpoints").exists() else True


def test_b3_no_inodes(small_disk: Callable[[str], Path]):
    disk = small_disk("nr_inodes=40")
    with pytest.raises(DiskError, match=r"3 checkpoints need 48 files, free are \d+ \(inodes\)"):
        check_disk(disk / "runs/base", 1, 2)
    check_disk(disk / "runs/base", 1, 1)


def test_b3_no_room_before_the_start(tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch):
    usage = type("Usage", (), {"free": 2_999})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DiskError, match="3 checkpoints need 3,000 bytes, free are 2,999") as error:
        check_disk(tmp_path / "not/yet/there", 1_000, 2)
    assert error.value.exit_code == 6
    check_disk(tmp_path / "not/yet/there", 999, 2)
    check_disk(run, 1_000, 2)  # its checkpoints will make room
    assert not (tmp_path / "not").exists()


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        OSError(122, "Disk quota exceeded"),
        RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed: No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        SafetensorError("Error while serializing: I/O error: Input/output error (os error 5)"),
    ],
)
def test_libraries_have_their_own_words_for_a_full_disk(run: Path, monkeypatch: pytest.MonkeyPatch, error: Exception):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(runfolder, "save_file", fail)
    with pytest.raises(DiskError, match=r"checkpoints: (No space left|Disk quota|Input/output).*; needed"):
        write(run, 15)
    monkeypatch.setattr(runfolder, "save_file", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("something else")))
    with pytest.raises(RuntimeError, match="something else"):
        write(run, 15)
    assert steps(run) == [5, 10]


@pytest.mark.parametrize(("umask", "files", "folders"), [(0, 0o644, 0o755), (0o22, 0o644, 0o755), (0o77, 0o600, 0o700)])
def test_s12_modes(tmp_path: Path, tokenizer: Tokenizer, umask: int, files: int, folders: int):
    run = tmp_path / "runs" / "base"
    before = os.umask(umask)
    try:
        with lock(run):
            write(run, 5, tokenizer)
            write_atomic(run / "config.yaml", b"x")
            write_status(run, "done", 0, "")
    finally:
        os.umask(before)
    for path in [run.parent, *run.parent.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (folders if path.is_dir() else files), path


def test_write_atomic_leaves_the_old_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "file"
    write_atomic(path, b"old")
    for name in ("fsync", "rename"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(DiskError, match="file: No space left on device; needed 3 bytes"):
                write_atomic(path, b"new")
        assert [path.name for path in tmp_path.iterdir()] == ["file"]
        assert path.read_bytes() == b"old"
    order: list[str] = []
    fsync, rename = os.fsync, os.rename
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda *arguments: (order.append("fsync"), fsync(*arguments)))
        patch.setattr(os, "rename", lambda *arguments: (order.append("rename"), rename(*arguments)))
        write_atomic(path, b"new")
    assert order == ["fsync", "rename", "fsync"]
    assert path.read_bytes() == b"new"


def test_what_a_killed_write_left_is_removed_by_the_next_save(run: Path):
    (run / ".tmp-0123").write_bytes(b"half")
    (run / ".tmp-export").mkdir()  # somebody else's, beside the run's own files
    write(run, 15)
    assert sorted(path.name for path in run.iterdir()) == [".tmp-export", "checkpoints"]


def test_status(tmp_path: Path, warnings: list[str]):
    write_status(tmp_path, "failed", 7, 'the "loss" is\nnot finite \u2028')
    status = json.loads((tmp_path / "status.json").read_text())
    assert status == {"status": "failed", "code": 7, "reason": 'the "loss" is\nnot finite \u2028'}
    write_status(tmp_path / "gone", "failed", 7, "")
    assert "status not recorded" in warnings[0]


# --- the lock ---------------------------------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from nanoqwen import runfolder
from nanoqwen.errors import BusyError
try:
    with runfolder.lock(Path(sys.argv[2])):
        print("held", flush=True)
        time.sleep(float(sys.argv[3]))
except BusyError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def hold(run: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLD, str(ROOT), str(run), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_i1_one_of_two_runs_holds_the_folder(tmp_path: Path):
    both = [hold(tmp_path / "run", 2), hold(tmp_path / "run", 2)]
    printed = sorted(process.communicate(timeout=60)[0] for process in both)
    assert sorted(process.returncode for process in both) == [0, 5]
    assert printed == [f"{tmp_path / 'run'}: busy, another run is writing to this folder\n", "held\n"]


def test_i2_a_killed_run_blocks_nobody(tmp_path: Path):
    process = hold(tmp_path, 600)
    assert process.stdout.readline() == "held\n"
    start = time.monotonic()
    with pytest.raises(BusyError) as error, lock(tmp_path):
        pass
    assert error.value.exit_code == 5
    assert time.monotonic() - start < 1
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = tree(tmp_path)
    for _ in range(20):
        with lock(tmp_path), pytest.raises(BusyError), lock(tmp_path):
            pass
    assert {name: data for name, (_, data) in tree(tmp_path).items()} == {n: d for n, (_, d) in before.items()}


def test_i2_a_worker_that_outlives_its_run_holds_nothing(tmp_path: Path):
    worker = "os.fork() or (print('working', flush=True), time.sleep(10))"
    script = HOLD.replace("time.sleep", f"import os; {worker}; os.kill(os.getpid(), 9) or ")
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(ROOT), str(tmp_path), "0"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    assert process.stdout.readline() == "working\n"  # it has left the lock behind, which takes it a moment
    process.wait()
    try:
        with lock(tmp_path):
            pass
    finally:
        process.stdout.close()


def test_the_lock_ends_with_the_block(tmp_path: Path):
    with pytest.raises(KeyError), lock(tmp_path):
        raise KeyError
    with lock(tmp_path):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match=r"Not a directory|File exists"), lock(tmp_path / "file"):
        pass


# --- the source record ------------------------------------------------------------------------------------------------


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_the_source_record_names_the_commit_and_what_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runfolder, "__file__", str(tmp_path / "nanoqwen" / "runfolder.py"))
    assert source_record()["commit"] is None
    git(tmp_path, "init")
    (tmp_path / "a.py").write_text("1\n")
    git(tmp_path, "add", "a.py")
    git(tmp_path, "commit", "-m", "a")
    record = source_record()
    assert record["commit"] == git(tmp_path, "rev-parse", "HEAD")
    assert record["changes"] is None
    assert record["versions"].keys() == {"python", *runfolder.PACKAGES}
    (tmp_path / "a.py").write_text("2\n")
    first = source_record()["changes"]
    (tmp_path / "a.py").write_text("3\n")
    assert re.fullmatch("[0-9a-f]{64}", first)
    assert source_record()["changes"] not in (None, first)
    monkeypatch.setenv("PATH", "")
    assert (source_record()["commit"], source_record()["changes"]) == (None, None)
    json.dumps(source_record())


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--x.api_key=canary"], ["--x.api_key=***"]),
        (["--hub-token", "canary"], ["--hub-token", "***"]),
        (["--PASSWORD=a=canary"], ["--PASSWORD=***"]),
        (["--data.train=https://me:canary@host/x"], ["--data.train=https://***@host/x"]),
        (["hf_canarycanary"], ["***"]),
        (["--name=from-environment!"], ["--name=***!"]),
        (["--infer.max_new_tokens=5", "--data.tokenizer", "gpt2"], None),
        (["--train.batch_tokens", "4096"], None),
        (["--token", "--other"], None),
    ],
)
def test_s9_no_secret_in_the_command(monkeypatch: pytest.MonkeyPatch, words: list[str], shown: list[str] | None):
    monkeypatch.setenv("SOME_SECRET_ACCESS_KEY", "from-environment")
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    assert source_record()["command"] == ["train.py", *(words if shown is None else shown)]
