"""Drives CMakeLists.txt, which owns the compiled part. All metadata is in pyproject.toml.

VCORE_BUILD_CPP=auto (default) builds where a compiler is found and warns where not, 1 fails hard, 0
skips. A wheel with the kernels is for one platform, but for every Python and every torch that
pyproject.toml allows: the libraries use torch's stable interface and nothing of Python.
"""

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MODE = os.environ.get("VCORE_BUILD_CPP", "auto")
if MODE not in ("auto", "0", "1"):
    raise SystemExit(f"VCORE_BUILD_CPP must be auto, 0 or 1, got {MODE!r}")


class CMakeBuild(build_ext):
    """Builds ``vcore_kernels/_C.so`` and, with CUDA, ``_C_cuda.so`` for torch.ops.load_library."""

    def run(self):
        for left_over in self.get_outputs():  # a build that fails must not ship an older one's
            os.remove(left_over)
        try:
            self.build_with_cmake()
        except (OSError, ImportError, subprocess.CalledProcessError) as error:
            if MODE == "1":
                raise SystemExit(
                    f"VCORE_BUILD_CPP=1, but the C++ kernels did not build: {error}"
                ) from error
            warnings.warn(
                f"the C++ kernels were not built ({error}); vcore_kernels falls back to the "
                "reference backend on a CPU. Set VCORE_BUILD_CPP=1 to make this an error.",
                stacklevel=1,
            )

    def build_with_cmake(self):
        import torch  # noqa: F401  (its headers are needed: a build without isolation)

        cmake = shutil.which("cmake")
        if cmake is None:
            raise OSError("cmake is not installed")
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        prefix = ROOT if self.inplace or self.editable_mode else Path(self.build_lib).resolve()
        configure = [
            cmake,
            "-S",
            ROOT,
            "-B",
            build,
            *generator,
            f"-DPython_EXECUTABLE={sys.executable}",
        ]
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", build, "--parallel"], check=True)
        # Nothing where CMake found no CUDA. The CPU kernels stand whatever becomes of it.
        if subprocess.run([cmake, "--build", build, "--parallel", "--target", "cuda"]).returncode:
            (build / "_C_cuda.so").unlink(missing_ok=True)
            warnings.warn(
                "the CUDA kernels were not built; Triton serves in their place", stacklevel=1
            )
        subprocess.run([cmake, "--install", build, "--prefix", prefix], check=True)

    def get_outputs(self):
        return sorted(map(str, (Path(self.build_lib) / "vcore_kernels").glob("_C*.so")))


class Wheel(bdist_wheel):
    """Tags the wheel by what is in it: ``py3-none-PLATFORM`` with kernels, or ``py3-none-any``."""

    def get_tag(self):
        _, _, platform = super().get_tag()
        has_kernels = self.get_finalized_command("build_ext").get_outputs()
        return "py3", "none", platform if has_kernels else "any"


setup(
    ext_modules=[] if MODE == "0" else [Extension("vcore_kernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
)
