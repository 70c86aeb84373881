"""docs/identity.md, every command and program of it, as a person would run them."""

import asyncio
import os
import re
import sys
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from tests.support.certs import Authority

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "identity.md").read_text()


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


async def run(directory: Path, *command: str, **variables: str) -> str:
    """What a command says in that directory."""
    search = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=directory,
        env={"PATH": search, "PYTHONPATH": str(ROOT), **variables},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, said.decode()
    return said.decode()


async def test_the_issuer_of_the_page_gives_out_the_identity_of_the_page(tmp_path: Path) -> None:
    entries, (commands,) = blocks("yaml"), blocks("console")
    asks, _ = blocks("python")
    (tmp_path / "entries.yaml").write_text("".join(entries))
    (tmp_path / "ask.py").write_text(asks)
    lines = [line.removeprefix("$ ") for line in commands.splitlines()]
    said = await run(
        tmp_path,
        "bash",
        "-euc",
        "\n".join(
            [
                "trap 'kill %1; wait' EXIT",
                *lines,
                "SPIFFE_ENDPOINT_SOCKET=unix://$PWD/agent.sock python ask.py",
            ]
        ),
    )
    assert "NSM_TRUST_DOMAIN=example.org  # environment" in said
    assert "URI:spiffe://example.org" in said
    assert "\n700\n" in said
    assert "spiffe://example.org/me example.org\n" in said


async def test_the_program_of_the_page_reads_certificate_files(tmp_path: Path) -> None:
    _, reads = blocks("python")
    (tmp_path / "reads.py").write_text(reads)
    authority = Authority("example.org")
    svid = authority.svid("/client")
    key = svid.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "key.pem").write_bytes(key)
    (tmp_path / "cert.pem").write_bytes(svid.leaf.public_bytes(Encoding.PEM))
    (tmp_path / "bundle.pem").write_bytes(authority.certificate.public_bytes(Encoding.PEM))
    said = await run(tmp_path, "python", "reads.py", "cert.pem", "key.pem", "bundle.pem")
    assert said.startswith("spiffe://example.org/client until ")
