"""What a forwarder asks of itself at its start, by what this kernel, or the lane's, can do."""

import subprocess
import sys
from pathlib import Path

import pytest

from forwarder import rights
from nsm.kernel.namespaces import have_handles

pytestmark = pytest.mark.kernel
WITHOUT = ["setpriv", "--bounding-set=-sys_ptrace", "--inh-caps=-sys_ptrace"]


def said(tmp_path: Path, isolation: str) -> tuple[int, str]:
    """How a forwarder without CAP_SYS_PTRACE ends, who finds no issuer, and what it says."""
    variables = {
        "NSM_NAME": "f",
        "NSM_ISOLATION": isolation,
        "NSM_LISTEN_ON": f"unix://{tmp_path}/f.sock",
        "SPIFFE_ENDPOINT_SOCKET": f"unix://{tmp_path}/nobody.sock",
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    }
    done = subprocess.run(
        [*WITHOUT, sys.executable, "-m", "forwarder"],
        env=variables, cwd=Path(rights.__file__).parents[1],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("isolation", ["hop", pytest.param("in-place", marks=pytest.mark.long)])
@pytest.mark.needs_kernel("before-6.18")
def test_where_only_processes_lead_to_a_namespace_it_is_asked_to_see_them(tmp_path, isolation):
    assert not have_handles()
    code, told = said(tmp_path, isolation)
    assert code == 3, told
    assert f"lacks CAP_SYS_PTRACE: without CAP_SYS_PTRACE {rights.UNFOUND}; " in told
    assert "or say NSM_ISOLATION=hop" not in told


@pytest.mark.needs_kernel("before-6.18")
def test_another_setting_is_not_offered_where_it_would_not_do(tmp_path):
    code, told = said(tmp_path, "auto")
    assert code == 3, told
    assert f"without CAP_SYS_PTRACE {rights.WITHOUT['CAP_SYS_PTRACE']}; " in told
    assert "or say NSM_ISOLATION=hop" not in told
