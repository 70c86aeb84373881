import os
import socket

from forwarder.sockets import Sockets


def listening(path):
    made = socket.socket(socket.AF_UNIX)
    made.bind(str(path))
    made.listen()
    return made


def test_wires_to_one_endpoint_share_one_descriptor_until_the_last_ends(tmp_path):
    sockets = Sockets()
    with listening(tmp_path / "nse"):
        before = len(os.listdir("/proc/self/fd"))
        first, second = (os.open(tmp_path / "nse", os.O_PATH) for _ in range(2))
        url = sockets.keep(first)
        assert sockets.keep(second) == url
        os.close(first)
        os.close(second)
        with socket.socket(socket.AF_UNIX) as dial:
            dial.connect(url.removeprefix("unix://"))
        assert sockets.again(url) == url
        for _ in range(2):
            sockets.release(url)
        assert len(sockets) == 1
        sockets.release(url)
        assert len(sockets) == 0
        assert len(os.listdir("/proc/self/fd")) == before


def test_a_url_that_is_no_descriptor_is_nobodys_to_release(tmp_path):
    sockets = Sockets()
    sockets.release("tcp://10.0.0.1:5001")
    assert sockets.again("tcp://10.0.0.1:5001") == "tcp://10.0.0.1:5001"
    assert len(sockets) == 0


def test_closing_lets_go_of_everything(tmp_path):
    sockets = Sockets()
    with listening(tmp_path / "nse"):
        before = len(os.listdir("/proc/self/fd"))
        fd = os.open(tmp_path / "nse", os.O_PATH)
        sockets.again(sockets.keep(fd))
        os.close(fd)
        sockets.close()
        assert len(os.listdir("/proc/self/fd")) == before
