"""The package and what it needs. Exact versions are pinned in tools/requirements.txt only."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(
    r'__version__ = "(.+)"', (HERE / "pltmoe/__init__.py").read_text(encoding="utf-8")
)
assert VERSION

# A lower bound is either a reason (named here) or the version that the tests ran on; an upper
# bound stands where the next one is known to break.
REQUIRES = [
    # tested from 2.11 to 2.14; with 2.15 Megatron-core 0.19 cannot read its own checkpoints
    "torch>=2.11,<2.15",
    "megatron-core>=0.19.2,<0.20",  # its interfaces change with every minor version
    "transformers>=5,<6",  # 5 changed how expert weights are stored
    "tokenizers>=0.22",  # the fast tokenizer of exported models; transformers bounds it further
    "mlflow>=3.17,<4",  # tested from here on; 4 may change the stores again
    "sentencepiece>=0.2",
    "safetensors>=0.8",  # as transformers 5 wants
    "pydantic>=2.7",  # use_attribute_docstrings
    "pyyaml>=6.0.1",  # wheels for Python 3.12
    "numpy>=2",
    "matplotlib>=3.9",
    "tqdm>=4.66",
    "xxhash>=3.4",  # checksums of checkpoint files
    "psutil>=6",  # memory of the process, and MLflow's system metrics
    "nvidia-ml-py>=12.560",  # MLflow's GPU metrics; pure Python, idle without a GPU
    "backports.zstd>=1; python_version < '3.14'",  # reads .zst corpora; in the library from 3.14
]

EXTRAS = {
    # Built from source against the torch that is there; comes ready-made with NGC containers.
    "te": ["transformer-engine[pytorch]>=2.20,<3"],
    # Megatron's experts are entered in DeepSpeed's own tables, so stay near what was tried.
    "deepspeed": ["deepspeed>=0.19.8,<0.20", "filelock>=3.12"],
    # math: checks the answers of the MATH benchmark.
    "eval": ["lm-eval[math]>=0.4.13,<0.5", "accelerate>=1.10"],
    # transformers[serving], openai: an exported model behind `transformers serve`, and its client.
    "test": [
        "pytest>=9,<9.2",  # with 9.2, xdist 3.8 ignores xdist_group
        "pytest-xdist>=3.8",
        "hypothesis>=6.100",
        "ruff>=0.17",
        "transformers[serving]>=5,<6",
        "openai>=1.98",
    ],
}

setup(
    name="pltmoe",
    version=VERSION[1],
    description="Pretraining of Parallel Loop Transformers (PLT) with experts on Megatron-core",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.12",  # megatron-core's own bound since 0.17
    packages=find_packages(include=["pltmoe", "pltmoe.*"]),
    # hf/*.py travel with exported weights, so they are wanted as files, templates beside them.
    package_data={"pltmoe": ["py.typed"], "pltmoe.hf": ["*.py", "*.md", "*.json", "*.jinja"]},
    zip_safe=False,
    install_requires=REQUIRES,
    extras_require=EXTRAS,
)
