import socket
import time

import pytest

from pdlightning.data import HubDataset, LocalFiles, PythonStandardLibrary
from pdlightning.data.documents import document_key, read_documents


def documents(corpus, split="train"):
    return list(read_documents(getattr(corpus.open(), split), corpus.column, corpus))


def hub(**changes):
    arguments = {"name": "owner/tales", "revision": "main", "column": "story"}
    return HubDataset(**arguments | {"train_split": "train", "eval_split": "test"} | changes)


def test_every_text_file_is_a_document(tmp_path):
    for name in ("b", "a"):
        (tmp_path / f"{name}.txt").write_text(f"{name}\n\nsecond line\n")
    corpus = LocalFiles(format="text", column="text", train=[str(tmp_path / "*.txt")], eval_fraction=0.5)
    assert documents(corpus) == ["a\n\nsecond line\n", "b\n\nsecond line\n"]


def test_parquet_and_json_give_the_same_documents(tmp_path, write_json):
    from datasets import Dataset

    ids = [[1, 2], [3], [4, 5, 6]]
    Dataset.from_dict({"ids": ids}).to_parquet(str(tmp_path / "ids.parquet"))
    parquet = LocalFiles(format="parquet", column="ids", train=[str(tmp_path / "ids.parquet")], eval_fraction=0.5)
    json = LocalFiles(format="json", column="ids", train=[write_json(ids, column="ids")], eval_fraction=0.5)
    assert [d.tolist() for d in documents(parquet)] == [d.tolist() for d in documents(json)] == ids


def test_empty_and_missing_documents_are_left_out(write_json):
    corpus = LocalFiles(format="json", column="text", train=[write_json(["a", "", None, "b"])], eval_fraction=0.5)
    assert documents(corpus) == ["a", "b"]


def test_keys_tell_documents_apart_and_spread_evenly():
    keys = [document_key(str(i)) for i in range(2000)]
    assert len(set(keys)) == 2000 and document_key("7") == keys[7]
    corpus = PythonStandardLibrary(eval_fraction=0.25)
    assert abs(sum(map(corpus.held_out, keys)) / 2000 - 0.25) < 0.05


def test_the_standard_library_has_no_tests_no_packages_and_nothing_undecodable(tmp_path, monkeypatch):
    for name in ("os.py", "json/__init__.py", "json/tests/test_it.py", "test/support.py", "site-packages/torch.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}")
    (tmp_path / "latin.py").write_bytes(b"# \xe9")
    (tmp_path / "empty.txt").write_text("no Python")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    corpus = PythonStandardLibrary(eval_fraction=0.5)
    assert documents(corpus) == ["# json/__init__.py", "# os.py"]
    before = corpus.identity()
    (tmp_path / "new.py").write_text("# another version")
    assert corpus.identity() != before


def test_a_standard_library_without_source_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match="No source text of the Python standard library"):
        PythonStandardLibrary(eval_fraction=0.5).open()


def test_this_machine_has_a_standard_library():
    corpus = PythonStandardLibrary(eval_fraction=0.05)
    names = {file.name for file in corpus.files()}
    assert len(names) > 300 and {"os.py", "typing.py"} <= names and "test_os.py" not in names


@pytest.fixture
def cached_dataset(tmp_path, monkeypatch):
    """owner/tales as `datasets` leaves it after a download: splits train and test, in one revision."""
    import datasets.config
    from datasets import DatasetInfo, Features, Value
    from datasets.arrow_writer import ArrowWriter

    folder = tmp_path / "hub" / "owner___tales" / "default" / "0.0.0" / ("a" * 40)
    folder.mkdir(parents=True)
    features = Features({"story": Value("string")})
    for split in ("train", "test"):
        with ArrowWriter(features=features, path=str(folder / f"tales-{split}.arrow")) as writer:
            for i in range(5):
                writer.write({"story": f"{split} {i}"})
            writer.finalize()
    splits = {s: {"name": s, "num_bytes": 1, "num_examples": 5, "dataset_name": "tales"} for s in ("train", "test")}
    names = {"builder_name": "parquet", "dataset_name": "tales", "config_name": "default", "version": "0.0.0"}
    DatasetInfo(features=features, splits=splits, **names).write_to_directory(str(folder))  # type: ignore[arg-type]
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")


def test_a_dataset_that_was_downloaded_once_needs_no_network(cached_dataset):
    assert documents(hub(revision="a" * 40)) == [f"train {i}" for i in range(5)]
    assert documents(hub(download=True), "eval") == [f"test {i}" for i in range(5)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"revision": "b" * 40}, "not of revision b+: .*Download that revision"),
        ({"train_split": "trian"}, r"owner/tales cannot be read: Unknown split \"trian\".*train"),
        ({"config": "other"}, r"owner/tales cannot be read: .*'other'\s+Available configs in the cache: \['default'\]"),
        (
            {"name": "owner/poems"},
            "owner/poems is not on this machine, and download is false. data.corpus.download=true",
        ),
        ({"streaming": True}, "not on this machine, and download is false.*Streaming needs the hub"),
    ],
)
def test_without_download_only_what_is_here_is_taken(cached_dataset, changes, message):
    with pytest.raises(ValueError, match=message):
        hub(**changes).open()


def test_the_hubs_own_switch_forbids_downloads_too(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set. Unset HF_HUB_OFFLINE"):
        hub(name="owner/poems", download=True).open()


@pytest.mark.parametrize("streaming", [False, True])
def test_a_machine_without_network_says_so_at_once(monkeypatch, streaming):
    def unknown(*arguments, **options):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    start = time.perf_counter()
    with pytest.raises(ValueError, match="cannot be downloaded: .* does not answer .*LocalFiles.*data=python_stdlib"):
        hub(download=True, streaming=streaming).open()
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": ["nowhere.jsonl"]}, "No file at /.*nowhere.jsonl"),
        ({"train": []}, "list of files is empty"),
        ({"format": "csv"}, "format must be text, json or parquet, got 'csv'"),
        ({"eval_fraction": None}, "either evaluation data of its own or eval_fraction"),
        ({"eval": ["*.jsonl"]}, "either evaluation data of its own or eval_fraction"),
        ({"eval": ["*.jsonl"], "eval_fraction": None}, "named for training and for evaluation: .*documents.jsonl"),
    ],
)
def test_local_files_that_make_no_sense_are_refused_when_built(write_json, monkeypatch, tmp_path, changes, message):
    monkeypatch.chdir(tmp_path)
    path = write_json(["a"])
    with pytest.raises(ValueError, match=message):
        LocalFiles(**{"format": "json", "column": "text", "train": [path], "eval_fraction": 0.5} | changes)


def test_a_file_whose_name_looks_like_a_pattern_is_a_file(write_json):
    path = write_json(["a"], "part[0].jsonl")
    assert documents(LocalFiles(format="json", column="text", train=[path], eval_fraction=0.5)) == ["a"]


@pytest.mark.parametrize(
    ("format", "name"), [("json", "broken.jsonl"), ("text", "broken.txt"), ("json", "empty.jsonl")]
)
def test_a_broken_file_is_named_as_such(tmp_path, format, name):
    (tmp_path / name).write_bytes(b"" if "empty" in name else b'{"text": "\xff')
    corpus = LocalFiles(format=format, column="text", train=[str(tmp_path / name)], eval_fraction=0.5)
    with pytest.raises(ValueError, match=rf"1 local {format} file\(s\) cannot be read: .*(JSON|utf-8|nothing)"):
        documents(corpus)
