"""Fine-tuning: the loop of train.py with other batches, and if need be another objective, from weights that exist.

    python finetune.py --base_ckpt runs/base                         a run, a Hugging Face folder or a hub id
    python finetune.py --base_ckpt runs/base --lora.rank 8           adapters instead of all weights
    python finetune.py --base_ckpt runs/base --show_data             what would be trained on, and what only read
    python finetune.py --base_ckpt runs/sft --objective contrast     to withstand injected instructions

Only assistants' turns are trained, each with the token that ends it. Conversations are packed into rows in which none
sees another. After the warm-up the rate falls when the validation loss stops falling, and the run ends by `patience`.

`contrast` trains the answers to a request, to the same reworded, and to the same with an injected instruction, and
beside them representations of these requests: see contrast.py, triplets.py and injection.py.
"""

from __future__ import annotations

if __name__ == "__main__":  # Ctrl-C while torch is being imported: leave, without a traceback
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)

import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call

from data import Batch, ChatBatches, Micro, chat_windows, show, write_text
from model import GPT, IGNORE
from nanoqwen.chat import ChatData, prepare_chat
from nanoqwen.config import Config, ContrastConfig, check, check_rows, load_config
from nanoqwen.corpus import prepare
from nanoqwen.distributed import World, all_reduce_sum, full_tensor, main_rank_first, ranks, start, stop, unwrap_model
from nanoqwen.errors import DataError, ResumeError, run_script, say
from nanoqwen.injection.contrast import COLLAPSED, HEAD, ProjectionHead, contrast_metrics, infonce, represent
from nanoqwen.injection.score import INJECTED, Score, check_detectors, examine, representations, score, why_unmeasurable
from nanoqwen.injection.triplets import (
    Tokenised,
    TripletBatches,
    check_triplets,
    fixed_sample,
    numbered,
    prepare_triplets,
    row_width,
    triplet_windows,
)
from nanoqwen.plan import settle
from nanoqwen.tokenizer import Tokenizer, load_tokenizer
from nanoqwen.weights import resolve
from train import (
    NO_MFU,
    Evaluator,
    FullCheckpoint,
    LanguageModeling,
    StepLoss,
    Task,
    Trainer,
    add_adapters,
    counted_loop,
    find_base,
    load_base,
    make_trainer,
    penalties_of,
    run,
    sample_continuation,
)

UTILITY_TOLERANCE = 0.01  # of utility, which robustness may cost


# --- what a checkpoint stores -----------------------------------------------------------------------------------------


class CheckpointWithHead(FullCheckpoint):
    """What another format stores, and a head in a file of its own."""

    def __init__(self, inner: FullCheckpoint, head: ProjectionHead):
        self.inner, self.head, self.loaded_by = inner, head, inner.loaded_by

    def tensors(self, model: GPT) -> dict[str, Tensor]:
        return self.inner.tensors(model) | {f"head.{name}": tensor for name, tensor in self.head.state_dict().items()}

    def write(self, trainer: Trainer, tensors: dict[str, Tensor], folder: Path) -> None:
        head = {name: tensor.contiguous() for name, tensor in tensors.items() if name.startswith("head.")}
        self.inner.write(trainer, {name: tensor for name, tensor in tensors.items() if name not in head}, folder)
        save_file(head, folder / HEAD)

    def read(self, folder: Path) -> dict[str, Tensor]:
        if not (folder / HEAD).is_file():
            raise ResumeError(f"{folder}: expected {HEAD}, the head trained beside the model, but it is missing")
        return self.inner.read(folder) | load_file(folder / HEAD)


# --- conversations ----------------------------------------------------------------------------------------------------


def answer_sampler(prompt: list[int]) -> Callable[[Trainer], dict[str, Any]]:
    """A sampler of what the model answers to a prompt."""

    def sample(trainer: Trainer) -> dict[str, Any]:
        ids = prompt[-(trainer.model.cfg.context - 1) :]
        return sample_continuation(trainer, ids, sorted(trainer.tokenizer.stop_ids))

    return sample


def open_chat(cfg: Config, data: ChatData, rows: int) -> ChatBatches:
    return ChatBatches(data.train, cfg.finetune.seq_len, rows, cfg.run.seed, pack=cfg.chat.pack)


def build(cfg: Config, world: World) -> Trainer:
    loop = cfg.finetune
    base = load_base(cfg, "finetune")
    model, tokenizer = base.model, base.tokenizer
    data = main_rank_first(world, lambda: prepare_chat(cfg.chat, tokenizer, loop.seq_len))
    say(str(data.audit))
    batches = open_chat(cfg, data, loop.rows)
    loop = counted_loop(loop, batches)
    checkpoint_format = add_adapters(cfg, base)
    objective = LanguageModeling(model.to(world.device), penalties_of(model, loop))
    windows = chat_windows(data.val, loop.seq_len, loop.eval_tokens)
    example = data.val[0]
    sample = answer_sampler(example.ids[: example.mask.tolist().index(True)].tolist())
    return make_trainer(
        cfg, loop, world, objective, tokenizer, batches, windows, sample, checkpoint_format, peak=NO_MFU
    )


# --- triplets ---------------------------------------------------------------------------------------------------------


class Contrast(LanguageModeling):
    """The task on three streams of each triplet, and a contrast between their requests.

    The contrast is over all triplets of a step, in whichever micro-batch and on whichever rank their streams lie. So
    each of its forwards knows the representations of the others as constants: its gradient is that by its own, and the
    sum over micro-batches and ranks is the gradient of the one loss (Gao and others 2021, arXiv 2101.06983).
    """

    def __init__(
        self, model: GPT, head: ProjectionHead, cfg: ContrastConfig, penalties: dict[str, float], world: World
    ):
        super().__init__(model, penalties)
        self.head, self.world, self.weight = head, world, cfg.weight
        self.loss = partial(infonce, temperature=cfg.temperature)

    @torch.no_grad()
    def before_step(self, micros: list[Micro], wrapped: nn.Module) -> list[Micro]:
        """With several micro-batches each needs the representations of the others: one more forward of all."""
        if len(micros) == 1:
            return micros
        devices = [micros[0].tokens.device] if micros[0].tokens.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):  # so that the dropout to come is the same
            outputs = [wrapped(micro.tokens, None, micro.documents, None, micro.extra) for micro in micros]
        z, present = (all_reduce_sum(sum(column), self.world) for column in zip(*outputs, strict=True))
        return [micro._replace(extra=(*micro.extra, z, present)) for micro in micros]

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None,
        documents: Tensor | None = None,
        at: Tensor | None = None,
        extra: tuple[Tensor, ...] = (),
    ) -> StepLoss | tuple[Tensor, Tensor]:
        """Without targets: (the representations in these rows, zeros elsewhere [3 G, P]; which those are [3 G])."""
        weights, streams, groups, *others = extra
        represent_only = targets is None
        if represent_only:
            targets, at = torch.full_like(tokens, IGNORE), tokens.new_empty(0)  # no logits are needed
        out = self.model(tokens, targets, documents=documents, at=at, weights=weights)
        z, present = represent(self.head, out.hidden, streams, 3 * len(groups))
        z, present = z * present[:, None], present.float()
        if represent_only:
            return z, present
        if not others and self.world.size > 1:
            others = [all_reduce_sum(tensor.detach().clone(), self.world) for tensor in (z, present)]
        if others:
            z, present = torch.where(present[:, None] > 0, z, others[0]), others[1]
        z, complete = z.unflatten(0, (-1, 3)), present.unflatten(0, (-1, 3)).amin(1)
        loss = self.loss(z, groups, complete)
        batch_metrics = contrast_metrics(z.detach(), groups, complete) | {"contrast/loss": loss.detach()}
        total, metrics = self.penalised(out, targets)
        metrics = {"loss": out.sums.unweighted, "task": out.sums.cross_entropy} | metrics
        return StepLoss(total, out.weight, metrics, self.weight * loss, batch_metrics)


class InjectionEvaluator(Evaluator):
    """How often attacks succeed on validation triplets, and how well the task is done.

    The best checkpoint is the one in which the fewest attacks succeed, among those that answer benign requests as well
    as the base did, within UTILITY_TOLERANCE.
    """

    def __init__(self, cfg: ContrastConfig, items: list[Tokenised], model: GPT, tokenizer: Tokenizer):
        self.items, self.answer_tokens = fixed_sample(items, cfg.eval_rows), cfg.answer_tokens
        self._check_detectors()
        self.floor = self._score(model, tokenizer).utility.value - UTILITY_TOLERANCE
        utility = self.floor + UTILITY_TOLERANCE
        say(f"base       answers {utility:.1%} of {len(self.items)} benign validation requests exactly")

    def _check_detectors(self) -> None:
        rows = [item.row for item in self.items if not why_unmeasurable(item.row)]
        if len(rows) < len(self.items):
            say(f"note: {len(self.items) - len(rows)} of {len(self.items)} validation triplets do not say what an "
                "attack is after (attack.canary): whether it succeeds is not measured there")  # fmt: skip
        if rows and not (calibration := check_detectors(rows)).sound:
            raise DataError(f"contrast.val: the detectors cannot be trusted on these rows: {calibration}")

    def _score(self, model: GPT, tokenizer: Tokenizer) -> Score:
        was_training = model.training
        verdicts = examine(model.eval(), tokenizer, self.items, self.answer_tokens)
        model.train(was_training)
        return score(verdicts)

    def __call__(self, trainer: Trainer) -> dict[str, float]:
        scores, contrast = self._score(trainer.model, trainer.tokenizer), self._contrast(trainer)
        if contrast["contrast/collapse"] > COLLAPSED:
            say(f"warning: unrelated requests look alike: contrast/collapse {contrast['contrast/collapse']:.3f}")
        rates = {name: getattr(scores, name) for name in ("attack_success", "utility", "utility_injected")}
        return {name: rate.value for name, rate in rates.items() if rate.of} | contrast

    def _contrast(self, trainer: Trainer) -> dict[str, float]:
        objective = unwrap_model(trainer.objective)
        weights = {name: full_tensor(tensor) for name, tensor in objective.head.named_parameters()}

        def head(pooled: Tensor) -> Tensor:
            return functional_call(objective.head, weights, (pooled,))

        was_training = trainer.model.training
        trainer.model.eval()
        with trainer.autocast:
            z, present = representations(trainer.model, head, self.items)
        trainer.model.train(was_training)
        groups = torch.tensor(numbered(item.row.group for item in self.items), device=z.device)
        complete = present.float().amin(1)
        metrics = contrast_metrics(z, groups, complete) | {"contrast/loss": objective.loss(z, groups, complete)}
        return {name: float(value) for name, value in metrics.items()}

    def sort_key(self, result: dict[str, float]) -> list[float]:
        shortfall = self.floor - result["utility"]
        return [1 + shortfall if shortfall > 0 else result.get("attack_success", 0.0), result["loss"]]


def build_contrast(cfg: Config, world: World) -> Trainer:
    loop, contrast = cfg.finetune, cfg.contrast
    base = load_base(cfg, "finetune")
    model, tokenizer = base.model, base.tokenizer
    data = main_rank_first(world, lambda: prepare_triplets(contrast, tokenizer, loop.seq_len))
    # The width of rows; a stream keeps to the seq_len that was asked for.
    loop = replace(loop, seq_len=row_width(data.train, loop.seq_len, loop.rows, model.cfg.context))
    check_rows(loop, world.size, "finetune")
    batches = TripletBatches(data.train, loop.seq_len, loop.rows, cfg.run.seed, contrast.stream_weights)
    loop = counted_loop(loop, batches)
    data.audit.padding = batches.padding
    say(str(data.audit))
    evaluator = InjectionEvaluator(contrast, data.val, model.to(world.device), tokenizer)
    checkpoint_format = add_adapters(cfg, base)
    head = ProjectionHead(model.cfg.hidden_size, contrast.head_size).to(world.device)
    objective = Contrast(model, head, contrast, penalties_of(model, loop), world)
    windows = triplet_windows(data.val, loop.seq_len, loop.eval_tokens)
    sample = answer_sampler(data.val[0].streams[INJECTED].prompt)
    return make_trainer(
        cfg, loop, world, objective, tokenizer, batches, windows, sample, CheckpointWithHead(checkpoint_format, head),
        evaluator=evaluator, peak=NO_MFU,
    )  # fmt: skip


# --- command line -----------------------------------------------------------------------------------------------------


def show_data(cfg: Config) -> int:
    """What a run would be trained on, counted, and its first rows. Without a base: in tokens of `data`."""
    loop = cfg.finetune
    if loop.objective == "contrast" and (code := check_triplets(cfg.contrast)):
        return code
    if loop.base_ckpt is not None:
        tokenizer = load_tokenizer(resolve(loop.base_ckpt))
    elif cfg.data.tokenizer != "auto":
        tokenizer = load_tokenizer(cfg.data.tokenizer)
    else:
        tokenizer = prepare(cfg.data, cfg.model.vocab_size).tokenizer
    if loop.objective == "contrast":
        data = prepare_triplets(cfg.contrast, tokenizer, loop.seq_len)
        loop = replace(loop, seq_len=row_width(data.train, loop.seq_len, loop.rows, loop.batch_tokens))
        batches = TripletBatches(data.train, loop.seq_len, loop.rows, cfg.run.seed)
        data.audit.padding, batch = batches.padding, Batch(*(part[:2] for part in batches(0)[:3]))
    else:
        data = prepare_chat(cfg.chat, tokenizer, loop.seq_len)
        batch = open_chat(cfg, data, rows=min(2, loop.rows))(0)
    say(str(data.audit))
    write_text(show(batch, tokenizer, sys.stdout.isatty()))
    return 0


SHARED = ("run", "finetune", "routing", "lora")
# By objective: what builds it, the sections of the configuration that decide the outcome, the command to try next.
OBJECTIVES = {
    "sft": (build, (*SHARED, "chat"), 'infer.py --ckpt {} --instruct --prompt "Write a function"'),
    "contrast": (build_contrast, (*SHARED, "contrast"), "eval.py --suite injection --ckpt {}"),
}


def main(argv: list[str]) -> int:
    cfg = load_config(argv, "finetune")
    if cfg.finetune.show_data:
        return show_data(cfg)
    cfg = replace(cfg, train=replace(cfg.train, base_ckpt=None))  # that of another run
    check(cfg, ranks(), cfg.finetune)
    find_base(cfg, "finetune")
    cfg = settle(cfg, "finetune")
    world = start(cfg.run.device)
    try:
        make, sections, command = OBJECTIVES[cfg.finetune.objective]
        return run(cfg, world, Task(make, sections, f"python {command.format(shlex.quote(cfg.run.dir))}"))
    finally:
        stop(world)


if __name__ == "__main__":
    run_script(main)
