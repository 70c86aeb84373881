"""Makes nsm/proto from protos/*.proto: `make protos`, and `--check` compares instead of writing.

For each file: messages (`_pb2.py`), their types (`_pb2.pyi`), grpclib stubs
(`_grpc.py`) and grpcio stubs (`_pb2_grpc.py`). The output depends on nothing
but the .proto files and the pinned grpcio-tools and grpclib.

protoc sees the files as `nsm/proto/NAME.proto`, so that what it writes imports
`nsm.proto.NAME_pb2` as it stands. Only the definitions other people's packages
register too are changed afterwards, see OWN_POOL.
"""

import os
import sys
import tempfile
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

HERE = Path(__file__).parent
TARGET = HERE.parent / "nsm" / "proto"
PLUGIN = "protoc-gen-grpclib_python"  # a script beside the interpreter
KINDS = ("_pb2.py", "_pb2.pyi", "_grpc.py", "_pb2_grpc.py")

# grpclib, grpcio-health-checking and spiffe each register these full names in
# the default pool under file names of their own, and a pool that meets a name
# twice raises. In a pool of their own ours can be imported beside all of them.
OWN_POOL = ("health", "workload")
DEFAULT_POOL = "_descriptor_pool.Default().AddSerializedFile("


def generate(target: Path) -> None:
    """Write all generated files into target; raises RuntimeError where protoc refuses."""
    names = sorted(path.name for path in HERE.glob("*.proto"))
    with tempfile.TemporaryDirectory() as scratch:
        arguments = [
            "protoc",
            f"-Insm/proto={HERE}",
            f"-I{resources.files('grpc_tools') / '_proto'}",
            *(f"--{kind}_out={scratch}" for kind in ("python", "pyi", "grpc_python")),
            f"--plugin=protoc-gen-grpclib={Path(sys.executable).parent / PLUGIN}",
            f"--grpclib_out={scratch}",
            *(f"nsm/proto/{name}" for name in names),
        ]
        if status := protoc.main(arguments):
            raise RuntimeError(f"protoc refused {', '.join(names)} with status {status}")
        for made in sorted((Path(scratch) / "nsm" / "proto").iterdir()):
            if not is_empty_stub(made):
                (target / made.name).write_text(finished(made))


def finished(made: Path) -> str:
    """The text of a generated file as we keep it."""
    text = made.read_text()
    if made.name not in {f"{name}_pb2.py" for name in OWN_POOL}:
        return text
    if text.count(DEFAULT_POOL) != 1:
        raise RuntimeError(f"{made.name}: protoc no longer writes {DEFAULT_POOL!r}; see OWN_POOL")
    imported = "".join(
        f"_pool.AddSerializedFile({line.rsplit(' ', 1)[1]}.DESCRIPTOR.serialized_pb)\n"
        for line in text.splitlines()
        if line.startswith("from google.protobuf import ") and "__pb2" in line
    )
    own = f"_pool = _descriptor_pool.DescriptorPool()  # see protos/generate.py\n{imported}"
    head, tail = text.split(f"DESCRIPTOR = {DEFAULT_POOL}")
    return f"{head}{own}DESCRIPTOR = _pool.AddSerializedFile({tail}"


def is_empty_stub(made: Path) -> bool:
    """Whether a stub file is for a .proto without a service, and so says nothing."""
    stub = made.name.endswith("_grpc.py")
    return stub and "class " not in made.read_text()


def differences(target: Path) -> list[str]:
    """What is missing, surplus or other in target than the .proto files give."""
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch)
        generate(fresh)
        wanted = {path.name: path.read_text() for path in fresh.iterdir()}
    found = {path.name: path.read_text() for kind in KINDS for path in target.glob(f"*{kind}")}
    return [
        f"nsm/proto/{name}: "
        + ("missing" if name not in found else "surplus" if name not in wanted else "differs")
        for name in sorted(wanted.keys() | found.keys())
        if wanted.get(name) != found.get(name)
    ]


def main() -> int:
    """`make protos` writes; `--check` says what differs and exits 1."""
    if sys.argv[1:] == ["--check"]:
        if wrong := differences(TARGET):
            sys.stderr.write(
                "\n".join([*wrong, "nsm/proto is not what protos/ gives: make protos", ""])
            )
            return 1
        return 0
    for kind in KINDS:
        for old in TARGET.glob(f"*{kind}"):
            os.unlink(old)
    generate(TARGET)
    return 0


if __name__ == "__main__":
    sys.exit(main())
