"""`nsmctl leaks`: every command of its page is run, and what differs is told in both directions."""

import json
import re
import shlex
import subprocess
from pathlib import Path

from labs import engine
from labs.faults import Faults
from nsm.kernel import owner
from tests.e2e.labs.test_labs import nsmctl, up
from tests.support.wait import until

PAGE = (Path(__file__).parents[3] / "docs/leaks.md").read_text()
SHOWN = re.search(r"```console\n(.+?)```", PAGE, re.DOTALL)


def told(lab: str, *more: str) -> tuple[int, list[dict[str, str]]]:
    done = nsmctl("leaks", "--lab", lab, "--json", *more)
    assert not done.stderr, done.stderr
    return done.returncode, json.loads(done.stdout)["found"]


def squeezed(text: str) -> list[list[str]]:
    """Its lines, by words: how wide a table's columns are is not its page's affair."""
    return [line.split() for line in text.splitlines() if line.strip()]


async def test_what_carries_a_mark_is_held_against_the_leases_as_its_page_shows():
    with up("two-nodes") as lab:
        assert SHOWN
        for part in re.split(r"^\$ ", SHOWN[1].replace("two-nodes", lab), flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            words = shlex.split(command)[1:]
            if words[0] == "nsmctl":
                done = nsmctl(*words[1:])
                if "--json" in words:
                    assert json.loads(done.stdout) == json.loads(output), command
                else:
                    assert squeezed(done.stdout) == squeezed(output), command
                left = "stray" in output and "--remove" not in words
                assert done.returncode == (1 if left else 0), command
            else:
                subprocess.run(words, check=True)
        # a device with a mark of its own, and a wire that a forwarder holds and that is not there
        group = str(owner.group("forwarder-east-1"))
        far = f"{lab}-far"
        ip = ["ip", "-n", far, "link"]
        subprocess.run([*ip, "add", "lost", "group", group, "type", "bridge"], check=True)
        subprocess.run([*ip, "set", "lost", "alias", str(owner.mark("nobodys", "src"))], check=True)
        faults = Faults(*engine.running(lab))
        faults.kill("forwarder@east-1")
        subprocess.run([*ip, "del", "nsm-2"], check=True)
        code, found = told(lab)
        seen = sorted((one["what"], one["where"], one["why"]) for one in found)
        assert (code, seen) == (1, [
            ("device lost", far, "no lease"), ("lease of icmp-v6", far, "no device"),
        ])  # fmt: skip
        code, _ = told(lab, "--remove")
        assert code == 1, "who has lost its device is not mended by taking things away"
        assert [one["why"] for one in told(lab)[1]] == ["no device"]
        faults.start("forwarder@east-1")
        # who was restarted ends that one, and the client asks for it again
        await until(lambda: told(lab) == (0, []), "no difference any more", bar=5)
