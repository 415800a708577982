"""The source distribution and the wheel: what is in them, and that they work where they should.

``VCORE_OTHER_TORCH="torch==2.10.0"`` runs the kernel tests of the wheel beside that torch, which
pip installs, instead of beside the one that the wheel was built with.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
OTHER_TORCH = os.environ.get("VCORE_OTHER_TORCH")
KERNEL_TESTS = ("head_accuracy", "head_hostile", "head_norms", "gibbs_weights", "perturbed")
KERNEL_TESTS += ("attention_jvp", "row_jvp")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler"),
]


def run(*command, **options) -> str:
    """The output of a command, which must succeed."""
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-6000:]}"
    return done.stdout


def pip(*arguments, **options) -> str:
    command = (sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments)
    return run(*command, cwd=options.pop("cwd", "/"), **options)


def build_environment(mode: str, **more: str) -> dict[str, str]:
    scripts = str(Path(sys.executable).parent)  # cmake and ninja, where pip has installed them
    path = os.pathsep.join([scripts, os.environ.get("PATH", "")])
    return {**os.environ, "PATH": path, "VCORE_BUILD_CPP": mode, **more}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The source distribution, made from a copy of this tree."""
    folder = tmp_path_factory.mktemp("source")
    left_out = shutil.ignore_patterns(
        ".git", ".venv", ".*_cache", "__pycache__", "build", "dist", "runs", "*.so", "*.egg-info"
    )
    shutil.copytree(ROOT, folder / "tree", ignore=left_out)
    run(sys.executable, "setup.py", "-q", "sdist", "-d", folder, cwd=folder / "tree")
    (archive,) = folder.glob("*.tar.gz")
    return archive


def build_wheel(source: Path, folder: Path, mode: str) -> Path:
    options = ("-q", "--no-build-isolation", "--no-deps", "--no-cache-dir")
    pip("wheel", *options, source, "-w", folder, env=build_environment(mode))
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    """A wheel with the compiled kernels, built from the source distribution."""
    return build_wheel(source, tmp_path_factory.mktemp("wheel"), "1")


@pytest.fixture
def venv_folder(tmp_path):
    yield tmp_path / "venv"
    shutil.rmtree(tmp_path / "venv", ignore_errors=True)  # gigabytes, with another torch in it


def environment(folder: Path, *, torch_here: bool = True) -> Path:
    """The Python of a new virtual environment, with or without the packages of this one."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    if torch_here:
        # Packages are found through it, but the .pth files beside them, among them that of an
        # editable vcore_kernels, are not read.
        site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
        paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        Path(site, "here.pth").write_text("\n".join(sorted(paths)))
    return python


def test_source_distribution_is_complete(source):
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    here = {
        str(path.relative_to(ROOT))
        for folder in ("csrc", "tests", "vcore_kernels", "python/vcore_train", "benchmarks", "docs")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    built = {name for name in here if name.endswith((".so", "results/latest.json"))}
    assert here - names == built
    assert {"CMakeLists.txt", "setup.py", "pyproject.toml", "Makefile", "README.md"} <= names
    assert {"LICENSE", "CHANGELOG.md", "CONTRIBUTING.md"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_wheel_is_for_every_python_and_needs_torch_and_numpy(wheel):
    platform = re.sub(r"[-.]", "_", sysconfig.get_platform())
    assert re.fullmatch(rf"vcore_kernels-[^-]+-py3-none-{platform}\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = next(name for name in names if name.endswith("/METADATA"))
        requirements = Parser().parsestr(archive.read(metadata).decode()).get_all("Requires-Dist")
    assert "vcore_kernels/_C.so" in names
    assert not any(name.startswith(("tests/", "csrc/")) for name in names)
    needed = [requirement for requirement in requirements if "extra ==" not in requirement]
    assert sorted(re.match(r"[\w-]+", requirement).group() for requirement in needed) == [
        "numpy",
        "torch",
    ]


def undefined_symbols(library: Path) -> list[str]:
    """What the library takes from others, as nm writes it: NAME or NAME@VERSION."""
    lines = run("nm", "-D", "--undefined-only", library).splitlines()
    return [line.split()[1] for line in lines if line.split()[0] != "w"]


# The C++ standard library in its mangled names, its operators new and delete, its type information.
STANDARD = re.compile(r"_Z(NK?St|T[ISTV]N?St|TVN10__cxxabiv1|St|nwm|nam|dlPv|daPv)|__(cxa|gxx)_")


def is_allowed(symbol: str) -> bool:
    name, _, version = symbol.partition("@")
    if re.match(r"GLIBC|CXXABI|GCC", version.lstrip("@")):
        return True
    return bool(re.fullmatch(r"(aoti_)?torch_[a-z]\w*", name) or STANDARD.match(name))


def test_symbol_rule_tells_the_stable_interface_from_the_rest():
    good = ["torch_parallel_for", "aoti_torch_get_sizes", "memcpy@GLIBC_2.14", "_ZNSt6localeD1Ev"]
    bad = ["_ZN2at15get_num_threadsEv", "_ZN3c105ErrorD1Ev", "_ZN5torch7LibraryD1Ev", "Py_IncRef"]
    assert [symbol for symbol in good + bad if is_allowed(symbol)] == good


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_compiled_kernels_use_the_stable_interface_alone(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        library = Path(archive.extract("vcore_kernels/_C.so", tmp_path))
    symbols = undefined_symbols(library)
    assert "torch_call_dispatcher" in symbols
    assert [symbol for symbol in symbols if not is_allowed(symbol)] == []


def test_wheel_passes_the_kernel_tests(wheel, source, tmp_path, venv_folder):
    """In an environment of its own, beside the torch that is here or VCORE_OTHER_TORCH."""
    python = environment(venv_folder, torch_here=not OTHER_TORCH)
    if OTHER_TORCH:
        pip("--python", python, "install", "-q", OTHER_TORCH, "numpy", "pytest", "hypothesis")
    pip("--python", python, "install", "-q", "--no-deps", wheel)
    with tarfile.open(source) as archive:
        wanted = [m for m in archive if re.match(r"[^/]+/(tests/|pyproject\.toml)", m.name)]
        archive.extractall(tmp_path, members=wanted, filter="data")
    (tests,) = tmp_path.glob("vcore_kernels-*")
    facts = run(
        python,
        "-c",
        "import torch, vcore_kernels as v; print(torch.__version__, v.__file__); "
        "assert v.backends()['cpp'], v.backends()['cpp'].reason",
        cwd=tests,
    )
    version, file = facts.split()[-2:]
    assert Path(file).is_relative_to(venv_folder)
    assert (version == torch.__version__) == (not OTHER_TORCH)
    # What other versions of torch warn of, and what their compiler can trace, is not for this test.
    output = run(
        *(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore"),
        *("-o", "pythonpath=tests", "-k", "not reference and not triton and not compile"),
        *("-m", "not slow and not gpu and not interpreter and not aot and not distributed"),
        *(f"tests/kernels/test_{name}.py" for name in KERNEL_TESTS),
        cwd=tests,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert int(re.search(r"(\d+) passed", output).group(1)) > 500, output
    print(f"torch {version}: {output.splitlines()[-1]}")


@pytest.mark.parametrize("lacks", ["cmake", "compiler"])
def test_installs_without_a_compiler(source, tmp_path, venv_folder, lacks):
    python = environment(venv_folder)
    env = build_environment("auto", CXX=str(tmp_path / "no-such-compiler"))
    if lacks == "cmake":
        env["PATH"] = str(python.parent)
    install = ("--python", python, "install", "-v", "--no-deps", "--no-build-isolation")
    output = pip(*install, "--no-cache-dir", source, env=env)
    assert "the C++ kernels were not built" in output
    assert "py3-none-any.whl" in output
    check = """
import torch, vcore_kernels
print(vcore_kernels.backends()["cpp"].reason)
hidden, weight, target = torch.randn(5, 8), torch.randn(11, 8), torch.arange(5)
expected = torch.nn.functional.cross_entropy(hidden @ weight.T, target, reduction="none")
torch.testing.assert_close(vcore_kernels.linear_nll(hidden, weight, target), expected)
"""
    assert "_C.so is not built" in run(python, "-c", check, cwd=tmp_path)


def test_build_that_must_have_kernels_fails_without_a_compiler(source, tmp_path):
    env = build_environment("1", CXX=str(tmp_path / "no-such-compiler"))
    with pytest.raises(AssertionError, match="VCORE_BUILD_CPP=1, but the C\\+\\+ kernels did not"):
        pip("wheel", "--no-build-isolation", "--no-deps", source, "-w", tmp_path, env=env)


def test_wheel_without_kernels_is_for_every_platform(source, tmp_path):
    wheel = build_wheel(source, tmp_path, "0")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert not [name for name in names if name.endswith(".so")]
    assert {"vcore_kernels/py.typed", "vcore_train/py.typed"} <= set(names)
