"""Installs yolos_jax: ``pip install -e '.[train]' -c constraints.txt``."""

from setuptools import find_packages, setup

setup(
    name="yolos_jax",
    version="0.1.0",
    description="Set-prediction detectors (YOLOS, DETR) trained with JAX on TPU and GPU pods",
    packages=find_packages(include=["yolos_jax", "yolos_jax.*"]),
    python_requires=">=3.11",
    install_requires=[
        "absl-py",
        "etils[epath]",
        "flax>=0.12,<0.13",
        "jax>=0.10.2,<0.13",
        "ml_collections>=1.0",
        "numpy>=2.0",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11.30,<0.13",
        "pillow>=10.1",  # whose own font has sizes
        "scipy>=1.11",
        "tqdm",
    ],
    extras_require={
        # Reading and decoding pictures, loose or as records; COCO metrics.
        "train": [
            "array_record>=0.8; platform_system == 'Linux'",
            "pycocotools>=2.0.7",
            "tensorflow-cpu>=2.20; platform_system == 'Linux' and platform_machine == 'x86_64'",
            "tensorflow>=2.20; platform_system != 'Linux' or platform_machine != 'x86_64'",
            "tensorflow-datasets>=4.9.9",
        ],
        # Reading PyTorch and Hugging Face checkpoints.
        "convert": ["huggingface_hub", "safetensors", "torch>=2.6"],
        # Compiling for TPU slices without one: benchmarks/scale.py.
        "scale": ["libtpu==0.0.51"],
        # Everything that the tests touch. transformers is the second, live reference, in a release
        # that prepares pictures without torchvision.
        "test": [
            "huggingface_hub",
            "hypothesis",
            "pytest",
            "pytest-xdist",
            "ruff",
            "safetensors",
            "torch==2.13.0",
            "transformers>=5.23,<6",
        ],
    },
)
