"""Packaging of adrec: metadata, extras and entry points. Tool settings live in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = "0.1.0"
ROOMS = ("adrec", "kernels", "compress", "bench")

TRITON = "triton>=3.6,<4; platform_system == 'Linux'"
ONNX = ["onnx>=1.18", "onnxruntime>=1.22", "onnxscript>=0.5"]
TORCHAO = "torchao>=0.18"
FAISS = "faiss-cpu>=1.9"
POLYGRAPHY = "polygraphy>=0.53"
EXTRAS = {
    "onnx": ONNX,
    "quantize": [TORCHAO],
    "faiss": [FAISS],
    "modelopt": [
        *ONNX,
        "nvidia-modelopt>=0.47",
        # What it needs of its extra "onnx", which allows onnx 1.21 only.
        *("lief", "onnx-graphsurgeon>=0.6.1", "onnxconverter-common>=1.16", "onnxslim>=0.1.76"),
    ],
    "polygraphy": [POLYGRAPHY],
    # Its wheels bring libraries for CUDA 13 from NVIDIA's own index.
    "tensorrt": [*ONNX, "tensorrt>=10.12; platform_system == 'Linux'"],
    "png": ["matplotlib>=3.8"],
    # Wheels of torch for CUDA bring Triton with them; this is for other builds of torch.
    "triton": [TRITON],
    # In an environment of its own: it pins ray 2.6, of Python 3.11 at most, and breaks with newer numpy and pandas.
    "recbole": ["recbole>=1.2.1; python_version < '3.12'", "numpy<2", "pandas<3"],
    "liger": ["liger-kernel>=0.6; platform_system == 'Linux'"],
    "dev": [
        "hypothesis>=6.100",
        "matplotlib>=3.8",
        "mypy>=1.13",
        "pre-commit>=3.7",
        "pytest>=8.2",
        "pytest-benchmark>=4.0",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.7",
        "ruff>=0.8",
        *ONNX,
        FAISS,
        POLYGRAPHY,
        TORCHAO,
        TRITON,
        "types-PyYAML>=6.0",
    ],
}

setup(
    name="adrec",
    version=VERSION,
    description="Inference optimisation for diffusion-based sequential recommendation",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=[*ROOMS, *(f"{room}.*" for room in ROOMS)]),
    package_data={room: ["py.typed", "*.html", "recipes/*.yaml"] for room in ROOMS},
    install_requires=[
        "lightning>=2.6",
        "numpy>=1.26",
        "plotly>=5.24",
        "polars>=2.0",
        "pyarrow>=17",
        "pydantic>=2.8",
        "pyyaml>=6.0",
        "rich>=13.7",
        "safetensors>=0.4.5",
        "tensorboardX>=2.6",
        "torch>=2.11",
        "typer>=0.15",
    ],
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": ["adrec = adrec.cli:main"],
        # Each entry is a function that adds its commands to the root Typer application, so that the
        # `adrec` package never imports `compress` or `bench`.
        "adrec.commands": [
            "adrec = adrec.commands:register",
            "bench = bench.cli:register",
            "compress = bench.compression.commands:register",
            "demo = bench.demo:register",
            "export = compress.export.command:register",
            "kernels = bench.kernels.commands:register",
        ],
        # What makes a file for an engine that reads one: `adrec` never imports `compress`.
        "adrec.exporters": [
            "aotinductor = compress.export.aotinductor:export_for_engine",
            "onnx = compress.export.onnx_export:export_for_engine",
            "tensorrt = compress.export.tensorrt.build:export_for_engine",
        ],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
