"""One line that says what a client wants, and a sentence for each mistake in it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsm import nsurl
from nsm.errors import InvalidError
from nsm.model import Mechanism
from nsm.nsurl import NSURL


@pytest.mark.parametrize(
    ("text", "means"),
    [
        ("kernel://icmp-responder/nsm-1", NSURL("KERNEL", "icmp-responder", "nsm-1")),
        (
            "kernel://svc@my.cluster2/nsm-1?app=x",
            NSURL("KERNEL", "svc@my.cluster2", "nsm-1", {"app": "x"}),
        ),
        (
            "vfio://svc?sriovToken=worker.domain/10G",
            NSURL("VFIO", "svc", None, {"sriovToken": "worker.domain/10G"}),
        ),
        ("memif://svc", NSURL("MEMIF", "svc")),
        ("kernel://svc/", NSURL("KERNEL", "svc", "")),
        ("kernel://svc/a/b", NSURL("KERNEL", "svc", "b")),
        ("KeRnEl://Svc", NSURL("KERNEL", "Svc")),
        ("kernel://svc:99/x", NSURL("KERNEL", "svc", "x")),
        ("kernel://svc@[fd00::1]:5002", NSURL("KERNEL", "svc@fd00::1")),
        ("kernel://svc?a=1&b=2&a=3", NSURL("KERNEL", "svc", None, {"a": "1,3", "b": "2"})),
        ("kernel://svc?a=x+y%2Bz&b", NSURL("KERNEL", "svc", None, {"a": "x y+z", "b": ""})),
        (" kernel://svc\n", NSURL("KERNEL", "svc")),
    ],
)
def test_what_a_line_means(text, means):
    assert nsurl.parse(text) == means


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "NSURL '' is empty"),
        ("icmp-responder", "NSURL 'icmp-responder' names no mechanism"),
        ("kernel:svc", "NSURL 'kernel:svc' names no mechanism"),
        ("://svc", "names no mechanism: '' is not a word"),
        ("9p://svc", "names no mechanism: '9p' is not a word"),
        ("kernel://", "names no service"),
        ("kernel:///nsm-1", "names no service"),
        ("kernel://@domain/nsm-1", "names no service before its '@'"),
        ("kernel://svc@/nsm-1", "names no domain behind its '@'"),
        ("kernel://a@b@c", "has two '@': a service has one domain"),
        ("kernel://a:pw@b", "has a ':' before its '@'"),
        ("kernel://svc:http/x", "has 'http' where a port would stand"),
        ("kernel://[fd00::1/x", "has a broken address '[fd00::1'"),
        ("kernel://s%41c", "has an escape in 's%41c'"),
        ("kernel://svc/a b", "holds ' '"),
        ("kernel://svc/nsm-1#x", "has a fragment, '#x', which means nothing here"),
        ("kernel://svc/%zz", "has a broken %-escape in its interface name"),
        ("kernel://svc/%ff", "is not UTF-8 in its interface name"),
        ("kernel://svc?a=%f", "has a broken %-escape in its label 'a'"),
        ("kernel://svc?=1", "has a label without a name, '=1'"),
        ("kernel://svc/sixteen-bytes-xx", "has 16 bytes, and Linux takes at most 15"),
        ("kernel://svc/..", "means something else to Linux"),
        ("kernel://svc/a%2fb", "holds '/'"),
        ("kernel://" + "s" * 5000, "has over 4096 bytes"),
    ],
)
def test_each_mistake_has_its_sentence_and_the_line_in_it(text, sentence):
    with pytest.raises(InvalidError) as refused:
        nsurl.parse(text)
    message = str(refused.value)
    assert sentence in message
    assert "NSURL" in message
    assert ";" in message, "what to do is missing"
    assert len(message) < 500


def test_a_preference_names_the_interface_only_if_the_line_does():
    inode = "inode://4/12"
    assert nsurl.parse("kernel://svc/nsm-1").preference(inode) == Mechanism(
        "LOCAL", "KERNEL", {"name": "nsm-1", "inodeURL": inode}
    )
    assert nsurl.parse("kernel://svc").preference() == Mechanism("LOCAL", "KERNEL", {})
    assert nsurl.parse("kernel://svc/").preference() == Mechanism("LOCAL", "KERNEL", {"name": ""})


PLAIN = st.text("abcXYZ019._-", min_size=1, max_size=10)


@given(
    st.builds(
        NSURL,
        st.sampled_from(["KERNEL", "VFIO"]),
        st.builds(lambda name, domain: name + domain, PLAIN, st.just("") | PLAIN.map("@{}".format)),
        st.none() | st.text("abc019-", min_size=0, max_size=15),
        st.dictionaries(
            st.text(st.characters(codec="utf-8"), min_size=1), st.text(st.characters(codec="utf-8"))
        ),
    )
)
def test_what_is_written_reads_back(url):
    if len(str(url)) <= nsurl.LONGEST:
        assert nsurl.parse(str(url)) == url


@given(st.text())
def test_no_text_ends_in_anything_but_an_answer_or_a_sentence(text):
    try:
        nsurl.parse("kernel://" + text)
    except InvalidError as refused:
        assert "NSURL" in str(refused)  # noqa: PT017 - an answer is fine too


@pytest.mark.parametrize(
    ("text", "means"),
    [
        ("", ()),
        ("a", (("a",),)),
        ("a,b", (("a",), ("b",))),
        ("[a,b],c", (("a", "b"), ("c",))),
        (" [ a , b ] , [c] ", (("a", "b"), ("c",))),
        ("[],a", (("a",),)),
    ],
)
def test_groups_are_lists_in_brackets(text, means):
    assert nsurl.groups(text) == means


@pytest.mark.parametrize("text", ["[a", "a]", "[a]b", "[[a]]", "[a,[b]"])
def test_brackets_that_do_not_pair_are_refused(text):
    with pytest.raises(InvalidError, match=r"write groups as \[a,b\],c"):
        nsurl.groups(text)


def test_awareness_groups_hold_services():
    found = nsurl.awareness_groups("[kernel://a,kernel://b],[kernel://c]")
    assert [[one.service for one in group] for group in found] == [["a", "b"], ["c"]]
