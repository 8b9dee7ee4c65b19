"""A job on its way: its streams, what it has found so far, and what of that is on record for a run that is killed."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq import environment, heap
from llmq.activations import HiddenStates
from llmq.calibration import Calibration, calibration_of, random_windows, split_held_out
from llmq.errors import RankError, SolverError, SpecError
from llmq.guidance import token_weights, winsorize
from llmq.journal import Journal, differences
from llmq.layers import Layer
from llmq.loading import Loader
from llmq.preflight import Job, check_calibration, vocabulary
from llmq.report import CONTINUING, FALLBACKS, LayerReport, Progress, Report, TuningReport
from llmq.rewriting import Rewriter
from llmq.statistics import Statistics
from llmq.stream import Stage, Stream
from llmq.types import QuantizedWeight
from llmq.weights import of_parts, parts_of

# Gradient steps see this many tokens, a compromise between many steps and quiet ones.
TOKENS_PER_STEP = 2048
_GUIDANCE_CAP = 0.99  # quantile above which the end-loss weights of tokens are cut off: their tails are heavy


class Run:
    """What the driver knows while it walks through the blocks."""

    def __init__(
        self,
        job: Job,
        device: torch.device,
        journal: Journal,
        progress: Callable[[Progress], None],
        states: Path,
        statistics: Statistics | None = None,
    ) -> None:
        self.job = job
        self.device = device
        self.journal = journal
        self.loader = Loader(job, device)
        self.rewriter = Rewriter(job)
        self.statistics = statistics  # instead of calibration
        self.calibration: Calibration | None = None
        self.random: Calibration | None = None  # windows of random tokens, which train along
        self.held_out: Calibration | None = None
        self.stream: Stream | None = None  # through the blocks as they are quantized
        self.reference: Stream | None = None  # through the original blocks
        self.token_weights: dict[str, Tensor] = {}  # by linear [groups, S, L]; empty: all tokens count alike
        self.weights: dict[str, QuantizedWeight] = {}  # of the block under way, or of all that are to be tuned
        self.stage_names: list[list[str]] = []  # within a block, for config.json
        self.block = 0
        self.done = 0  # linears
        self._states = states  # folder of the hidden states
        self._progress = progress
        self.report = Report(
            versions=environment.versions(),
            machine=environment.machine(device),
            source=str(job.source.path),
            recipe=job.recipe.model_dump(mode="json"),
            calibration=None,
        )

    @property
    def parts(self) -> list[Calibration]:
        """All windows, in the order of the streams."""
        return [part for part in (self.calibration, self.random, self.held_out) if part is not None]

    @property
    def identity(self) -> dict[str, object]:
        """What decides on the bytes of the output, but for the weights and the calibration text."""
        return {
            "recipe": self.report.recipe,
            "versions": self.report.versions,
            "machine": {
                "device": self.report.machine["device_name"],
                "threads": self.report.machine["threads"],
                "instructions": torch.backends.cpu.get_cpu_capability(),
            },
            "batch_tokens": self.job.budget.batch_tokens,
            "solver_rows": self.job.budget.solver_rows,
        }

    def check_ranks(self, known: Mapping[str, object]) -> None:
        """Check that all processes of the run agree on what is `known` of its identity, so that they make one output.

        Raises:
            RankError: one does not; what differs is named.
        """
        for rank, found in enumerate(self.job.ranks.gather(dict(known))):
            if unlike := differences(dict(known), found, "") if rank != self.job.ranks.rank else []:
                raise RankError(
                    f"rank {rank} differs from rank {self.job.ranks.rank} in {'; '.join(unlike)}; processes that share "
                    "a run need the same machine, versions and files"
                )

    def prefix(self, index: int) -> str:
        """Return the name of block number `index`, and a dot."""
        return self.job.structure.prefixes[index]

    def tell(self, phase: str, layer: LayerReport | None = None) -> None:
        """Report progress, on the first rank alone."""
        if not self.job.ranks.first:
            return
        blocks = len(self.job.structure.blocks)
        block = min(self.block, blocks - 1)
        self._progress(Progress(phase, self.done, len(self.job.linears), block, blocks, layer))

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the seconds of the block to `phase` in the report."""
        self.tell(phase)
        start = time.perf_counter()
        yield
        self.report.seconds[phase] = self.report.seconds.get(phase, 0.0) + time.perf_counter() - start

    def load_calibration(self, given: Calibration | None) -> str | None:
        """Set the calibration windows, those given or the recipe's, and return their fingerprint; None: none needed."""
        if not self.job.solver.calibrated:
            return None
        if self.statistics is not None:
            self.report.calibration = self.statistics.manifest["calibration"]
            return self.statistics.fingerprint
        recipe = self.job.recipe
        whole = given or calibration_of(recipe, _tokenizer(self.job))
        check_calibration(self.job, whole)
        samples, seq_len = whole.input_ids.shape
        # a single window cannot be split, and one that judges itself judges nothing
        share = recipe.held_out if samples > 1 else 0.0
        self.calibration, self.held_out = split_held_out(whole, share, recipe.seed)
        if not recipe.response_only:  # random tokens answer nothing
            self.random = random_windows(whole, recipe.random_windows, vocabulary(self.job), recipe.seed)
        self.report.calibration = {
            "source": whole.source,
            "samples": samples,
            "random_samples": 0 if self.random is None else self.random.input_ids.shape[0],
            "held_out_samples": 0 if self.held_out is None else self.held_out.input_ids.shape[0],
            "seq_len": seq_len,
            "tokens": whole.tokens,
            "fingerprint": whole.fingerprint,
        }
        return whole.fingerprint

    def start_streams(self) -> None:
        """Set the hidden states in front of the first block that is not finished, and the weights of tokens."""
        if self.calibration is None:
            return
        recipe = self.job.recipe
        if self._needs_outside:
            with self.timed("load"):
                self.loader.outer()
        if recipe.guidance_groups:
            with self.timed("guidance"):  # of the original model, before it is rewritten
                self.token_weights = self._guidance()
        elif recipe.response_only:
            answers = torch.cat([part.counted for part in self.parts]).float()[None]
            self.token_weights = {linear.name: answers for linear in self.job.linears}
        with self.timed("transform"):
            self.rewriter.outer()
            done = self.journal.find("block")
            if done is not None:  # what was done to the blocks that are finished, and around them
                self.rewriter.notes, self.rewriter.changed = list(done["notes"]), set(done["changed"])
        with self.timed("forward"):
            self.stream = self.begin_stream(self._hidden("stream"))
            if self.job.needs_reference:
                states = self._hidden("reference")
                self.reference = self.stream.at(states) if states else self.stream.fork(self._states / "reference")
        for stream in self._streams:
            stream.hidden.sync()
        self.job.ranks.barrier()  # from here on they read each other's states

    def begin_stream(self, hidden: HiddenStates | None = None) -> Stream:
        """Return the stream in front of the first block, or where `hidden` was restored to."""
        assert self.calibration is not None, "streams are of calibration windows"
        recipe, tokens = self.job.recipe, self.job.budget.batch_tokens
        with nullcontext() if self._needs_outside else self.loader.entrance():
            return Stream.start(
                self.job.model,
                self.job.structure,
                self.calibration,
                self.device,
                random=self.random,
                held_out=self.held_out,
                batch_tokens=min(tokens, TOKENS_PER_STEP) if recipe.tune_steps or recipe.tune_epochs else tokens,
                hidden=hidden,
                replays=self.job.budget.replays,
            )

    @property
    def _needs_outside(self) -> bool:
        """Whether all that is around the blocks stays in memory, and not only what the entrance takes for a while."""
        recipe = self.job.recipe
        for_logits = recipe.guidance_groups > 0 or recipe.tune_epochs > 0
        return for_logits or recipe.rotation != "none" or not self.loader.has_entrance

    @property
    def _streams(self) -> list[Stream]:
        return [stream for stream in (self.stream, self.reference) if stream is not None]

    def _hidden(self, name: str) -> HiddenStates:
        """Return the states that an earlier process left in front of the current block, or none."""
        cached, ranks = self.job.budget.cached, self.job.ranks
        if self.block == 0:
            return HiddenStates(self.device, self._states / name, cached=cached, ranks=ranks)
        return HiddenStates.restored(self.device, self._states / name, self.block, cached=cached, ranks=ranks)

    def _guidance(self) -> dict[str, Tensor]:
        """Return the end-loss weights of all windows, as found by the first rank."""
        if not self.journal.find("guidance"):
            if self.job.ranks.first:
                self.journal.save("guidance", self._weigh_tokens())
            self.job.ranks.barrier()
            self.journal.append("guidance")
        return self.journal.load("guidance")

    def _weigh_tokens(self) -> dict[str, Tensor]:
        """Return the end-loss weights of all windows, those held out last."""
        blocks = range(len(self.job.structure.blocks))
        for index in blocks:
            self.loader.block(index)
        found: list[dict[str, Tensor]] = []
        for part in self.parts:
            weights = token_weights(
                self.job.model,
                self.job.linears,
                part,
                groups=self.job.recipe.guidance_groups,
                loss="self",
                seed=self.job.recipe.seed,
            )
            found.append(winsorize(weights, _GUIDANCE_CAP, part.attention_mask))
        for index in blocks:
            self.loader.release(index)
        return {name: torch.cat([weights[name] for weights in found], dim=1) for name in found[0]}

    def keep_stage(self, index: int, number: int, layers: list[Layer]) -> None:
        """Put the solved linears of a stage on record."""
        self.journal.save(f"stage-{index}-{number}", _parts({layer.linear.name: layer.weight for layer in layers}))
        reports = [asdict(layer.report) for layer in layers]
        self.journal.append("stage", block=index, stage=number, layers=reports, seconds=self.report.seconds)

    def kept_stage(self, index: int, number: int, stage: Stage) -> list[Layer] | None:
        """Return the linears of a stage that an earlier process solved, if one did."""
        record = self.journal.find("stage", block=index, stage=number)
        if record is None:
            return None
        reports = {entry["name"]: _layer_report(entry) for entry in record["layers"]}
        tensors = self.journal.load(f"stage-{index}-{number}")
        return [
            Layer(linear, self.weight_of(linear.name, linear.shape[1], tensors), reports[linear.name])
            for linear in stage.linears
        ]

    def weight_of(self, name: str, in_features: int, tensors: dict[str, Tensor]) -> QuantizedWeight:
        """Return the weight of a linear whose parts are among `tensors`."""
        start = f"{name}."
        parts = {key.removeprefix(start): t.to(self.device) for key, t in tensors.items() if key.startswith(start)}
        parts.pop("bias", None)  # of the linear, which model tuning keeps beside it
        return of_parts(parts, self.job.grid, self.job.spec.group_columns(in_features), in_features)

    def keep_block(self, index: int) -> None:
        """Put on record that a block is finished: its tensors are on the disk, the streams have passed it."""
        for stream in self._streams:
            stream.hidden.sync()
        self.job.ranks.barrier()  # all have done that, and need no file any more that goes now
        self.journal.append(
            "block",
            index=index,
            stage_names=self.stage_names,
            changed=sorted(self.rewriter.changed),
            notes=self.rewriter.notes,
            tuning=[asdict(tuning) for tuning in self.report.tuning],
            seconds=self.report.seconds,
        )
        for stream in self._streams:
            stream.hidden.settle()
        for record in self.journal.all("stage"):
            if record["block"] == index:
                self.journal.drop(f"stage-{index}-{record['stage']}")
        heap.trim()

    def resume(self) -> None:
        """Take up what an earlier process has finished: from here on `block` is the first that is not."""
        for record in self.journal.records:
            self.report.seconds |= record.get("seconds", {})
        done = self.journal.find("block")
        if done is None:
            return
        self.block = done["index"] + 1
        self.stage_names = done["stage_names"]
        self.report.tuning = [TuningReport(**entry) for entry in done["tuning"]]
        for record in self.journal.all("stage"):
            if record["block"] < self.block:
                self.report.layers += [_layer_report(entry) for entry in record["layers"]]
        self.done = sum(len(linears) for linears in self.job.structure.linears[: self.block])
        self.tell(CONTINUING)

    def keep_weights(self, index: int) -> None:
        """Keep a block for model tuning, packed weights and dense tensors, in a file for later processes too."""
        tensors = _parts({linear.name: self.weights[linear.name] for linear in self.job.structure.linears[index]})
        packed = {f"{linear.name}.weight" for linear in self.job.structure.linears[index]}
        for name, parameter in self.job.structure.blocks[index].named_parameters(prefix=self.prefix(index)[:-1]):
            if name not in packed:
                tensors[name] = parameter.detach()
        self.journal.save(f"block-{index}", tensors)

    def kept_weights(self, index: int) -> None:
        """Bring back a block that `keep_weights` has kept; it must be loaded."""
        tensors = self.journal.load(f"block-{index}")
        for linear in self.job.structure.linears[index]:
            self.weights[linear.name] = self.weight_of(linear.name, linear.shape[1], tensors)
        with torch.no_grad():
            for name, parameter in self.job.structure.blocks[index].named_parameters(prefix=self.prefix(index)[:-1]):
                if name in tensors:
                    parameter.copy_(tensors[name])

    def drop_states(self) -> None:
        """Remove the hidden states, which no other run can use."""
        shutil.rmtree(self._states, ignore_errors=True)

    def check_fallbacks(self) -> None:
        """Stop a run in which too many Hessians were unusable.

        Raises:
            SolverError: more layers than the recipe allows ended rounded to nearest.
        """
        lost = [layer.name for layer in self.report.layers if FALLBACKS & set(layer.remedies)]
        allowed = self.job.recipe.max_fallback
        if len(lost) > allowed * len(self.report.layers):
            raise SolverError(
                f"{len(lost)} of {len(self.report.layers)} layers have a Hessian that no damping repairs (first "
                f"{lost[0]}) and would do without; check the calibration data, or raise max_fallback"
            )


def _parts(weights: Mapping[str, QuantizedWeight]) -> dict[str, Tensor]:
    """Return the tensors of these weights, by name and part; see `Run.weight_of`."""
    return {f"{name}.{part}": t for name, weight in weights.items() for part, t in parts_of(weight).items()}


def _layer_report(entry: dict[str, Any]) -> LayerReport:
    report = LayerReport(**entry)
    return replace(report, remedies=tuple(report.remedies), undone=tuple(report.undone))


def _tokenizer(job: Job) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(job.source.path, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises Exception itself
        raise SpecError(
            f"{job.source.path}: has no usable tokenizer, which calibration text needs "
            f"({' '.join(str(error).split())[:200]}); add tokenizer.json, or use --method rtn"
        ) from error
