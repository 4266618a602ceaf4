"""Build a strongly typed TensorRT plan from an ONNX file: one code path for TensorRT 10.12 and newer.

Nothing here names a precision: TensorRT 11 has no flags for it, and in 10 they are refused in a strongly typed network.
Enumeration members are looked up by name where versions differ; their integers are never stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from adrec.engines.tensorrt.library import TensorRTError, collecting_logger, flag_bits, last_messages, start
from adrec.engines.tensorrt.profiles import Profile, check_profiles
from adrec.files import write_bytes
from compress.export.tensorrt.graph import Graph
from compress.export.tensorrt.inspection import LayerTypes, check_precision, read_layers
from compress.export.tensorrt.options import MEBIBYTE, BuildOptions


@dataclass(frozen=True)
class Built:
    """A plan in memory, what the engine inspector says of it, and TensorRT's warnings."""

    content: bytes
    layers: LayerTypes
    confirmed: bool
    warnings: tuple[str, ...]


def build(
    trt: ModuleType,
    graph: Graph,
    profiles: Sequence[Profile],
    options: BuildOptions,
    *,
    timing_cache: Path | None = None,
) -> Built:
    """Build a plan and check the dtypes of its layers. Raises TensorRTError with all that TensorRT said.

    timing_cache: read if it is there, and written back with what this build measured; a cache of another TensorRT or
    GPU is left as it is and not used.
    """
    check_profiles(profiles, graph.dimensions)
    logger = collecting_logger(trt)
    builder = start(trt.Builder, logger)
    network = parse(trt, builder, graph, logger)
    config = builder.create_builder_config()
    configure(trt, config, options)
    for profile in profiles:
        add_profile(builder, config, graph, profile)
    refused = _load_timing_cache(config, timing_cache)
    host_memory = builder.build_serialized_network(network, config)
    if host_memory is None:
        raise TensorRTError(f"TensorRT built no engine from {graph.path}: {last_messages(logger)}")
    content = bytes(host_memory)
    if timing_cache is not None and refused is None:
        write_bytes(timing_cache, bytes(config.get_timing_cache().serialize()))
    layers = read_layers(trt, content, graph, profiles, options, logger)
    return Built(content, layers, check_precision(layers, graph), (*logger.messages, *filter(None, [refused])))


def parse(trt: ModuleType, builder: Any, graph: Graph, logger: Any) -> Any:
    """The network of an ONNX file, strongly typed. Raises TensorRTError with every error of the parser."""
    wanted = ["STRONGLY_TYPED"]
    if graph.plugins:
        wanted.append("PREFER_AOT_PYTHON_PLUGINS")
    network = builder.create_network(flag_bits(trt.NetworkDefinitionCreationFlag, *wanted))
    parser = trt.OnnxParser(network, logger)
    if graph.plugins:
        # Else the parser would take the node's model-local function, which is there for other runtimes.
        parser.set_flag(trt.OnnxParserFlag.ENABLE_PLUGIN_OVERRIDE)
    if not parser.parse_from_file(str(graph.path)):
        errors = [_parser_error(parser.get_error(index)) for index in range(parser.num_errors)]
        raise TensorRTError(f"TensorRT cannot read {graph.path}: " + ("; ".join(errors) or last_messages(logger)))
    if network.num_layers == 0:
        raise TensorRTError(f"TensorRT read no layer from {graph.path}")
    return network


def configure(trt: ModuleType, config: Any, options: BuildOptions) -> None:
    """Set memory, verbosity and flags of a builder configuration."""
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib * MEBIBYTE)
    # Without it the inspector shows names only, and no precision could be checked.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.builder_optimization_level = options.optimization_level
    config.hardware_compatibility_level = getattr(
        trt.HardwareCompatibilityLevel, options.hardware_compatibility.upper()
    )
    if options.tf32:
        config.set_flag(trt.BuilderFlag.TF32)
    else:
        # TensorRT sets it by default.
        config.clear_flag(trt.BuilderFlag.TF32)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.weights != "fixed":
        config.set_flag(trt.BuilderFlag.REFIT)
    if options.weights == "stripped":
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)


def add_profile(builder: Any, config: Any, graph: Graph, profile: Profile) -> None:
    """Add one optimisation profile with a range for every input that has a dynamic dimension."""
    ranges = builder.create_optimization_profile()
    for info in graph.inputs:
        if any(isinstance(size, str) for size in info.shape):
            smallest, best, largest = (profile.shape(info.shape, which) for which in ("min", "opt", "max"))
            try:
                ranges.set_shape(info.name, smallest, best, largest)
            except (ValueError, RuntimeError) as error:
                raise TensorRTError(f"TensorRT refused the profile '{profile}' for '{info.name}': {error}") from None
    if config.add_optimization_profile(ranges) < 0:
        raise TensorRTError(f"TensorRT refused the profile '{profile}' for {graph.path}")


def _load_timing_cache(config: Any, path: Path | None) -> str | None:
    """Give the configuration a timing cache, from a file if there is one; why it was refused, None where it was not.

    A refused file is left as it is: another TensorRT or GPU may still read it.
    """
    if path is None:
        return None
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if cache is not None and config.set_timing_cache(cache, False):
        return None
    return (
        f"{path}: TensorRT refuses this timing cache (damaged, or of another version or GPU), so that everything is"
        " timed anew and nothing written there; name another file, or remove it"
    )


def _parser_error(error: Any) -> str:
    node = error.node_name() or f"node {error.node()}"
    return f"{node} ({error.node_operator()}): {error.desc()}"
