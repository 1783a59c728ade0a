"""`import hf_galore` registers; importing a submodule alone does not; in whatever order, threads and ways to import."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import hf_galore.registering

# ---- a package that needs no torch, with our file in it

FILES = {
    "__init__.py": """
        import os, time
        from .registering import register_on_import
        register_on_import(__spec__)
        X = 1
        if os.environ.get("SLOW"):
            time.sleep(0.2)
    """,
    "integrations/__init__.py": "",
    "integrations/trainer.py": """
        import os, time
        if os.environ.get("SLOW"):
            time.sleep(0.2)
        TIMES = 0
        def register():
            global TIMES
            if os.environ.get("MOVED"):
                raise ImportError("cannot register: moved")
            TIMES += 1
    """,
    "optim.py": "",
    "plan.py": "",
    "__main__.py": """
        import sys
        from package.optim import __name__
        trainer = sys.modules.get("package.integrations.trainer")
        print(trainer is not None and trainer.TIMES)
    """,
    "deep/__init__.py": "from ..other.module import Y",
    "other/__init__.py": "from . import module",
    "other/module.py": "Y = 1",
    "program.py": "import package",
}

PRELUDE = """
import importlib, os, sys, threading, time

def registered():
    trainer = sys.modules.get("package.integrations.trainer")
    return trainer is not None and trainer.TIMES

def fails(statement):
    try:
        exec(compile(statement, "", "exec"), {})
    except ImportError as error:
        assert str(error) == "cannot register: moved", error
        return True
    return False
"""

CASES = {
    "the package": "import package; assert registered() == 1; import package; assert registered() == 1",
    "a name of it": "from package import X; assert registered() == 1",
    "by a function": "importlib.import_module('package'); assert registered() == 1",
    "by a module that uses it": "import package.program; assert registered() == 1",
    "submodules": """
        from package.optim import __name__
        from package.deep import Y
        importlib.import_module("package.plan")
        import package.plan
        import package.plan as plan
        import package.optim, package.other.module
        package.X
        assert not registered()
    """,
    "the package after a submodule": "import package.optim; import package; assert registered() == 1",
    "a name after a submodule": "from package.deep import Y; from package import X; assert registered() == 1",
    "a submodule as a name": "import package.optim; from package import plan; assert registered() == 1",
    "once": """
        import package.optim
        import package
        kind = type(package.__spec__)
        import package, package.plan
        assert registered() == 1
        assert kind.__name__ == "ModuleSpec"
    """,
    "reloaded": """
        import package
        importlib.reload(package)
        assert registered() == 2
        importlib.reload(package.plan) if hasattr(package, "plan") else None
        assert registered() == 2
    """,
    "reloaded after a submodule": """
        import package.optim
        importlib.reload(sys.modules["package"])
        assert registered() == 1
    """,
    "moved": """
        os.environ["MOVED"] = "1"
        for _ in range(2):
            assert fails("import package") and "package" not in sys.modules
        del os.environ["MOVED"]
        import package
        assert registered() == 1
    """,
    "moved, after a submodule": """
        os.environ["MOVED"] = "1"
        import package.optim
        for statement in ("import package", "from package import X", "__import__('package')"):
            # What is raised where CPython asks is suppressed before 3.13; it is logged, and the next import tries anew.
            assert fails(statement) or sys.version_info < (3, 13)
            assert not registered()
        import package.plan, json  # other imports are as ever
        del os.environ["MOVED"]
        import package
        assert registered() == 1
    """,
    "threads": """
        os.environ["SLOW"] = "1"
        def submodule():
            from package.optim import __name__
        def package():
            import package
            assert registered()
            done.append(True)
        for pause in (0.1, 0.3, 0.5):
            done = []
            threads = [threading.Thread(target=target) for target in (submodule, package, submodule, package)]
            for thread in threads:
                thread.start()
                time.sleep(pause)
            for thread in threads:
                thread.join(20)
            assert done == [True, True]
            for name in [name for name in sys.modules if name.startswith("package")]:
                del sys.modules[name]
    """,
}


def interpreters() -> list[str]:
    """This one, and others that our requirements allow where they are there."""
    others = [f"python3.{minor}" for minor in range(10, 16) if minor != sys.version_info.minor]
    found = [path for path in map(shutil.which, others) if path is not None]
    works = [
        path for path in found if subprocess.run([path, "-c", ""], capture_output=True, check=False).returncode == 0
    ]
    return [sys.executable, *works]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("path")
    for name, code in FILES.items():
        file = folder / "package" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(code))
    shutil.copy(hf_galore.registering.__file__, folder / "package")
    return folder


@pytest.mark.parametrize("python", interpreters(), ids=lambda path: Path(path).name)
@pytest.mark.parametrize("case", CASES)
def test_what_registers(case: str, python: str, folder: Path) -> None:
    """Fails first where an interpreter no longer asks `__spec__._initializing` at each import of a module."""
    code = PRELUDE + textwrap.dedent(CASES[case])
    run = subprocess.run([python, "-c", code], cwd=folder, capture_output=True, text=True, check=False, timeout=60)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("python", interpreters(), ids=lambda path: Path(path).name)
@pytest.mark.parametrize(("module", "printed"), [("package", "False"), ("package.__main__", "False"), ("user", "1")])
def test_what_registers_by_the_name_of_a_module(module: str, printed: str, python: str, folder: Path) -> None:
    """`python -m hf_galore.cli.main --version` waits for no transformers; a program that imports the package does."""
    (folder / "user.py").write_text("import package, package.integrations.trainer as t; print(t.TIMES)")
    run = subprocess.run([python, "-m", module], cwd=folder, capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.split() == [printed]


def test_a_registration_that_fails_is_never_silent(folder: Path) -> None:
    code = "os.environ['MOVED'] = '1'; import package.optim\ntry:\n    import package\nexcept ImportError:\n    pass"
    run = subprocess.run(
        [sys.executable, "-c", PRELUDE + code], cwd=folder, capture_output=True, text=True, check=True, timeout=60
    )
    assert "package is imported, but not registered: cannot register: moved" in run.stderr


# ---- hf_galore


def run_python(code: str, **env: str) -> None:
    """Run code in a fresh interpreter, and in it what it asserts."""
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **env},
    )
    assert run.returncode == 0, run.stderr


def test_submodules_patch_nothing_and_the_package_registers_after_them() -> None:
    run_python(
        """
        import importlib, importlib.util, pathlib, sys

        from hf_galore.optim import GaLoreAdamW
        from hf_galore.lowrank.projection import (project)
        from hf_galore.rules.adam import adam_
        from hf_galore.backward.hooks import BackwardHooks
        from hf_galore.optim.build import make_optimizer
        assert "transformers.trainer" not in sys.modules  # nor is it waited for
        assert "trl" not in sys.modules

        import transformers, trl
        from transformers.trainer import Trainer
        import trl.trainer.utils, trl.trainer.sft_trainer
        from packaging.version import parse
        owners = [Trainer, trl.trainer.utils, trl.trainer.sft_trainer.SFTTrainer]
        if parse(trl.__version__) >= parse("1.15"):
            import trl.kernels.chunked_logprob
            owners.append(trl.kernels.chunked_logprob)
        before = [dict(vars(owner)) for owner in owners]

        def untouched():
            return all(vars(owner)[key] is value for owner, kept in zip(owners, before) for key, value in kept.items())

        root = pathlib.Path(sys.modules["hf_galore"].__file__).parent
        for file in sorted(root.rglob("*.py")):
            parts = file.relative_to(root.parent).with_suffix("").parts
            elsewhere = {"bootstrap", "__main__", "__init__"}
            if importlib.util.find_spec("triton") is None:
                elsewhere.add("programs")  # its kernels
            if importlib.util.find_spec("axolotl") is None:
                elsewhere |= {"axolotl", "axolotl_plan"}  # its plugin and command
            if not elsewhere & set(parts):
                importlib.import_module(".".join(parts))
        import hf_galore.plan
        names = [getattr(hf_galore, name) for name in hf_galore.__all__]
        assert set(hf_galore.__all__) <= set(dir(hf_galore))
        assert untouched() and not hf_galore.integrations.trainer.is_registered()

        from hf_galore import GaLoreConfig
        assert not untouched() and hf_galore.integrations.trainer.is_registered()
        hf_galore.unregister()
        assert untouched()
        """
    )


@pytest.mark.parametrize("first", ["import hf_galore.integrations.trainer", "import transformers.trainer", "pass"])
def test_a_process_that_is_to_be_registered_is_whatever_comes_first(first: str) -> None:
    """`python -m hf_galore`: the script's first import may be of a part that imports transformers' Trainer itself."""
    root = Path(hf_galore.registering.__file__).parent
    path = [str(root / "bootstrap"), str(root.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    run_python(
        f"""
        import sys
        {first}
        import transformers.trainer
        from hf_galore.integrations.trainer import is_registered
        assert is_registered()
        assert not [finder for finder in sys.meta_path if type(finder).__name__ == "_Registrar"]
        """,
        PYTHONPATH=os.pathsep.join(path),
    )
