"""One runtime's program: trace, lower and prove every graph, by the first way that works."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from edgetrain.export import locate, parity
from edgetrain.export.errors import OperatorError, UnsupportedError
from edgetrain.export.graph import joint
from edgetrain.export.graph.decompositions import Decompositions
from edgetrain.export.graph.functional import functional_problem
from edgetrain.export.graph.joint import Problem, TracedGraph
from edgetrain.export.graph.narrow import narrowed_problem
from edgetrain.export.graph.partition import Split, split_step, with_features
from edgetrain.export.lowering.base import FurtherGraphs, LoweredGraph, Lowering, Run
from edgetrain.protocol.bundle import file_entry
from edgetrain.protocol.manifest import Graph, Program

logger = logging.getLogger(__name__)

Trace = Callable[[Problem, Decompositions], TracedGraph]


def make_program(
    lowering: Lowering, problem: Problem, expected: parity.Expected, files: dict[str, bytes], *, split: bool
) -> Program:
    """All graphs of one runtime, proven; their files are added to `files`.

    With `split`, also the trunk and the head, if the runtime takes them and something worth it is frozen.

    Raises:
        UnsupportedError: an operator or a control flow that cannot be exported.
        ParityError: a graph computes other numbers than eager torch.
    """
    translator = Translator(lowering, problem)
    graphs: dict[str, Graph] = {}

    def write(graph: TracedGraph, lowered: LoweredGraph, prove: Callable[[TracedGraph, Run], None]) -> None:
        prove(graph, lowering.load(lowered))
        graphs[graph.name] = graph_entry(lowering.runtime, graph, lowered, files)

    def add(trace: Trace, prove: Callable[[TracedGraph, Run], None]) -> TracedGraph:
        graph, lowered = translator.translate(trace)
        write(graph, lowered, prove)
        return graph

    def evaluation(graph: TracedGraph, run: Run) -> None:
        parity.prove_eval(lowering.runtime, problem, graph, run, expected)

    def step(graph: TracedGraph, run: Run) -> None:
        report = parity.prove_step(lowering.runtime, problem, graph, run, expected, kinks=True)
        logger.info(
            f"{lowering.runtime}: largest gradient error {report.gradient:.1e} ({report.worst}), "
            f"loss error {report.loss:.1e}"
        )

    whole = add(joint.trace_step, step)
    for graph in lowering.further_graphs(whole) if isinstance(lowering, FurtherGraphs) else ():
        write(graph, lowering.lower(graph), step)
    add(joint.trace_eval, evaluation)
    if parts := split_problem(whole, problem) if split and lowering.splits else None:
        trunk = lowering.lower(parts.trunk)
        # The head is proven on what the lowered trunk gives, so that both together are the step.
        features = lowering.load(trunk)([tensor.numpy() for tensor in parts.trunk.example])
        graphs["trunk"] = graph_entry(lowering.runtime, parts.trunk, trunk, files)
        for head, prove in ((parts.head_step, step), (parts.head_eval, evaluation)):
            write(with_features(head, features), lowering.lower(head), prove)
    add(
        joint.trace_infer,
        lambda graph, run: parity.prove_infer(lowering.runtime, problem, graph, run, expected),
    )
    if expected.clipped is not None:
        clipped = expected.clipped
        add(
            joint.trace_step_per_sample_clipped,
            lambda graph, run: parity.prove_clipped(lowering.runtime, problem, graph, run, clipped),
        )
    return Program(runtime=lowering.runtime, minimum_version=lowering.minimum_version, graphs=graphs)


def split_problem(step: TracedGraph, problem: Problem) -> Split | None:
    """The parts of a traced step, if it is worth it."""
    example = problem.example
    parts = split_step(
        step,
        num_parameters=len(problem.names),
        inputs=example.inputs.leaf_names,
        micro_batch=example.micro_batch,
    )
    if parts is not None:
        logger.info(
            f"trunk: {parts.share:.0%} of the step's operations, {parts.bytes_per_sample:,} bytes of features a sample"
        )
    return parts


class Translator:
    """Translates graphs directly, or, once that has failed, by way of `torch.export`."""

    def __init__(self, lowering: Lowering, problem: Problem) -> None:
        self._lowering = lowering
        self._decompositions = lowering.decompositions()
        self._original = problem
        self._direct = self._narrowed(problem)
        self._functional: Problem | None = None

    def translate(self, trace: Trace) -> tuple[TracedGraph, LoweredGraph]:
        """Traces and lowers one graph.

        Raises:
            UnsupportedError: neither way works.
        """
        if self._functional is not None:
            return self._attempt(trace, self._functional, functional_problem)
        try:
            # Sample by sample, the batch is smaller than a narrowed graph's.
            whole = trace is joint.trace_step_per_sample_clipped
            return self._attempt(trace, self._original if whole else self._direct, self._narrowed)
        except UnsupportedError as error:
            logger.debug(f"direct trace failed, trying torch.export: {error}")
            first = error
        try:
            functional = functional_problem(self._original)
            result = self._attempt(trace, functional, functional_problem)
        except Exception as second:  # torch.export raises whatever it met; the direct trace says it better
            raise first from second
        self._functional = functional
        return result

    def trace(self, trace: Trace) -> TracedGraph:
        """Traces one graph that can be lowered."""
        return self.translate(trace)[0]

    def _narrowed(self, problem: Problem) -> Problem:
        return (narrowed_problem(problem) if self._lowering.narrows else None) or problem

    def _attempt(
        self, trace: Trace, problem: Problem, way: Callable[[Problem], Problem]
    ) -> tuple[TracedGraph, LoweredGraph]:
        with locate.module_path(problem.prepared.module) as running:
            try:
                graph = trace(problem, self._decompositions)
            except Exception as error:  # tracing runs the user's code under dispatch modes: anything can come
                raise locate.cannot_trace(problem, running, error) from error
        if trace is joint.trace_step:
            # What the way has made of the module may hold for one size of batch only: so it is gone again.
            graph = replace(
                graph, first=lambda samples: trace(way(self._original.first(samples)), self._decompositions)
            )
        try:
            return graph, self._lowering.lower(graph)
        except OperatorError as error:
            raise locate.no_translation(self._original, self._lowering.runtime, error.operator, error.cause) from error


def graph_entry(runtime: str, graph: TracedGraph, lowered: LoweredGraph, files: dict[str, bytes]) -> Graph:
    """Adds a lowered graph's files to `files` and describes it."""
    new = {f"{runtime}/{file}": data for file, data in ({lowered.file: lowered.data} | lowered.extra).items()}
    files |= new
    entries = [file_entry(file, data) for file, data in new.items()]
    return Graph(
        file=entries[0],
        inputs=graph.inputs if lowered.inputs is None else lowered.inputs,
        outputs=graph.outputs,
        extra_files=tuple(entries[1:]),
        planned_memory=lowered.planned_memory,
    )
