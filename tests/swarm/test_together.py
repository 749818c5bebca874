"""Several nodes stage one model: each byte is read from the origin once, and every node ends with all of them."""

from __future__ import annotations

import pytest
from support.faulty_server import FaultyServer
from support.models import CHUNK, below, published, small_model
from support.swarm import stage_together
from swarm.conftest import Make

from headrace.cache.manifest import PUBLISHED_NAME
from headrace.cache.reading import StoredSnapshot
from headrace.cache.snapshot import Selection
from headrace.cache.stager import StagerLimits

MODEL = small_model()
SIZE = sum(map(len, MODEL.values()))


def sent(server: FaultyServer) -> int:
    return sum(server.bytes_sent(f"model/{path}") for path in MODEL)


@pytest.mark.parametrize("vouched", [False, True], ids=["learned", "published"])
def test_nodes_that_start_together_read_each_byte_once(make: Make, vouched: bool) -> None:
    files = published(MODEL) if vouched else MODEL
    nodes = [make() for _ in range(4)]
    with FaultyServer(below("model", files), rate=2e7) as server:
        reports = stage_together(nodes, f"{server.url}/model")
        assert sent(server) == SIZE
        for node, report in zip(nodes, reports, strict=True):
            assert node.files() == MODEL
            assert sum(report.sources.values()) == SIZE
            assert report.notes == ()
        assert sum(report.sources["origin"] for report in reports) == SIZE
        assert sum(report.sources["peer"] for report in reports) == 3 * SIZE


@pytest.mark.parametrize("vouched", [False, True], ids=["learned", "published"])
def test_nodes_that_start_together_ask_what_is_there_once(make: Make, vouched: bool) -> None:
    files = published(MODEL) if vouched else MODEL
    nodes = [make() for _ in range(3)]
    with FaultyServer(below("model", files)) as server:
        stage_together(nodes, f"{server.url}/model")
        assert len(server.requests(f"model/{PUBLISHED_NAME}")) == 1
        assert len(server.requests("model/")) == (0 if vouched else 1)
        for path in MODEL:
            assert len(server.requests(f"model/{path}", method="HEAD")) == 1


@pytest.mark.parametrize("vouched", [False, True], ids=["learned", "published"])
def test_a_node_that_comes_later_reads_nothing_from_the_origin(make: Make, vouched: bool) -> None:
    files = published(MODEL) if vouched else MODEL
    with FaultyServer(below("model", files)) as server:
        reference = f"{server.url}/model"
        make().stage(reference)
        server.clear()
        later = make()
        # What the first one found out is believed: nothing at all is asked of the origin.
        report = later.stage(reference, revalidate="1h")
        assert server.requests("*") == []
        assert report.sources == {"origin": 0, "peer": SIZE, "local": 0}
        assert later.files() == MODEL


def test_with_the_origin_gone_peers_have_everything(make: Make) -> None:
    with FaultyServer(below("model", MODEL)) as server:
        reference = f"{server.url}/model"
        make().stage(reference)
    later = make(grace=0.0)
    report = later.stage(reference)
    assert report.sources["peer"] == SIZE
    assert later.files() == MODEL
    assert any("is staged from other nodes, as they last found it" in note for note in report.notes)


def test_a_file_under_two_names_is_brought_once(make: Make) -> None:
    files = {**MODEL, "copy-of-model.safetensors": MODEL["model-00001-of-00002.safetensors"]}
    nodes = [make() for _ in range(2)]
    with FaultyServer(below("model", published(files))) as server:
        reports = stage_together(nodes, f"{server.url}/model")
        assert sum(server.bytes_sent(f"model/{path}") for path in files) == SIZE
        for node, report in zip(nodes, reports, strict=True):
            assert node.files() == files
            assert sum(report.sources.values()) == SIZE


def test_nodes_with_another_selection_take_what_is_the_same(make: Make) -> None:
    """Each selection is a snapshot and a swarm of its own; its objects are the same."""
    with FaultyServer(below("model", published(MODEL))) as server:
        reference = f"{server.url}/model"
        make().stage(reference)
        server.clear()
        other = make()
        report = other.stage(reference, selection=Selection(include=("*-00001-*",)))
        assert sent(server) == 0
        assert report.sources["peer"] == len(MODEL["model-00001-of-00002.safetensors"])


def test_what_is_on_this_disk_is_not_asked_of_others(make: Make) -> None:
    """Under another path, so that only the digests say that it is the same."""
    moved = {f"moved/{path}": data for path, data in MODEL.items()}
    with FaultyServer({**below("one", published(MODEL)), **below("two", published(moved))}) as server:
        first, second = make(), make()
        first.stage(f"{server.url}/one")
        second.stage(f"{server.url}/two")
        server.clear()
        report = first.stage(f"{server.url}/two")
        assert report.sources["peer"] == report.sources["origin"] == 0
        assert server.bytes_sent("two/moved/*") == 0


def test_what_a_reader_waits_for_comes_first(make: Make) -> None:
    with FaultyServer(below("model", MODEL), rate=3e6) as server:
        node = make()
        job = node.job(
            f"{server.url}/model", limits=StagerLimits(span=CHUNK, connections=2, reserve=0)
        ).start()
        opened = job.wait_prepared()
        source = StoredSnapshot(*opened, check=job.check)
        last = source.open("model-00002-of-00002.safetensors")
        last.wait(last.size - 10, last.size, timeout=20)
        assert job.progress.done < SIZE
        job.wait()
        last.close()
        source.close()
        assert node.files() == MODEL


def test_files_without_bytes_need_nobody(make: Make) -> None:
    nodes = [make() for _ in range(2)]
    files = {"config.json": b"", "empty.txt": b""}
    with FaultyServer(below("model", published(files))) as server:
        for report in stage_together(nodes, f"{server.url}/model"):
            assert report.sources == {"origin": 0, "peer": 0, "local": 0}
        assert [node.files() for node in nodes] == [files, files]
