import subprocess
import sys

FORBIDDEN = ("node", "torch", "web3", "aiohttp", "requests", "numpy", "sqlalchemy")


def test_attribution_imports_no_room_no_network_and_no_tensors():
    code = (
        "import pkgutil, sys, attribution\n"
        "for module in pkgutil.iter_modules(attribution.__path__, 'attribution.'): __import__(module.name)\n"
        "print(' '.join(sys.modules))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()

    assert "attribution.receipt" in loaded
    assert not [name for name in loaded if name.split(".")[0] in FORBIDDEN]
