import importlib
import subprocess
import sys

import pytest

import barlow


def test_importing_it_loads_nothing_heavy():
    code = "import sys, barlow; dir(barlow); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "onnxruntime", "numpy", "nvidia.dali"} & set(modules)


def test_the_public_names_are_those_of_their_modules():
    assert dir(barlow) == sorted(["__version__", *barlow.__all__])
    for name in barlow.__all__:
        public = getattr(barlow, name)
        assert public is getattr(importlib.import_module(public.__module__), name)
    assert set(barlow.__all__) == set(barlow._HOMES)


def test_other_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="module 'barlow' has no attribute 'Decoder'"):
        barlow.Decoder  # noqa: B018
    with pytest.raises(ImportError):
        from barlow import decoder  # noqa: F401


def test_it_is_typed(request):
    assert (request.config.rootpath / "src/barlow/py.typed").exists()
