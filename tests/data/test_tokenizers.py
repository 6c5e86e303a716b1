import socket
import time

import pytest

from pdlightning.data import ByteTokenizer, PlainIds, PretrainedTokenizer, TrainedTokenizer

TEXTS = [f"def area_{i}(self, side):\n    return side * side  # é 漢 <|endoftext|>\n" for i in range(40)]


@pytest.fixture
def trained():
    tokenizer = TrainedTokenizer(vocab_size=320)
    tokenizer.train(TEXTS)
    return tokenizer


@pytest.fixture
def save_pretrained(tmp_path):
    """Writes a small tokenizer as transformers does; returns its folder."""

    def save(kind):
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast

        if kind == "words":
            tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # type: ignore[call-arg]
            tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
            trainer = trainers.WordPieceTrainer(vocab_size=80, special_tokens=["[UNK]", "[EOS]"])
        elif kind == "underscores":
            tokenizer = Tokenizer(models.BPE())
            tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
            trainer = trainers.BpeTrainer(vocab_size=80, special_tokens=["</s>"])
        else:
            tokenizer = Tokenizer(models.BPE())
            tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
            alphabet = pre_tokenizers.ByteLevel.alphabet()
            trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet)
        tokenizer.train_from_iterator(["the dogs run, the dog is running here <end>"], trainer)
        ends = {"underscores": {"eos_token": "</s>"}, "bytes": {"eos_token": "<end>"}, "words": {}}[kind]
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends).save_pretrained(tmp_path / kind)
        return str(tmp_path / kind)

    return save


def test_trained_tokens_give_the_text_back(trained):
    for text, ids in zip(TEXTS, trained.encode(TEXTS), strict=True):
        assert "".join(trained.decode(ids)) == text and len(ids) < len(text)
        assert trained.end_id not in ids and max(ids) < trained.vocab_size
    assert trained.decode([trained.end_id]) == ["<|endoftext|>"]
    unseen = "\x00 \t\r\n 🙂 ~"
    assert trained.ready().decode(trained.encode([unseen])[0]) == unseen


def test_training_twice_gives_the_same_tokenizer_and_saving_keeps_it(trained, tmp_path):
    again, loaded = TrainedTokenizer(vocab_size=320), TrainedTokenizer(vocab_size=320)
    again.train(iter(TEXTS))
    trained.save(tmp_path)
    loaded.load(tmp_path)
    assert trained.ready().to_str() == again.ready().to_str() == loaded.ready().to_str()
    assert loaded.encode(TEXTS) == trained.encode(TEXTS)


def test_a_tokenizer_learns_from_the_first_characters_alone(trained, monkeypatch):
    monkeypatch.setattr("pdlightning.data.tokenizers.TRAINING_CHARACTERS", sum(map(len, TEXTS)) - 5)
    limited = TrainedTokenizer(vocab_size=320)
    limited.train([*TEXTS[:-1], TEXTS[-1][:-5] + "zzzzz", *["zzzzz " * 50] * 50])
    assert not [token for token in limited.ready().get_vocab() if "zz" in token]


def test_a_vocabulary_that_the_text_cannot_fill_is_an_error():
    with pytest.raises(ValueError, match=r"give 2\d\d tokens at most, and vocab_size is 5000: lower it"):
        TrainedTokenizer(vocab_size=5000).train(["ab ab"])
    with pytest.raises(ValueError, match="at least 257 .* got 256"):
        TrainedTokenizer(vocab_size=256)


def test_an_untrained_tokenizer_says_so():
    with pytest.raises(RuntimeError, match="neither trained nor loaded"):
        TrainedTokenizer(vocab_size=300).encode(["a"])


def test_bytes_are_bytes():
    tokenizer = ByteTokenizer()
    assert list(tokenizer.encode(["aé"])[0]) == [97, 195, 169]
    assert tokenizer.decode([97, 195, 169, 256]) == ["a", "\\xc3", "\\xa9", "<|endoftext|>"]


@pytest.mark.parametrize(("kind", "end"), [("bytes", "<end>"), ("underscores", "</s>"), ("words", "[EOS]")])
def test_a_pretrained_tokenizer_keeps_spaces_and_ends_with_its_own_token(save_pretrained, kind, end):
    tokenizer = PretrainedTokenizer(name_or_path=save_pretrained(kind), end_token="[EOS]" if kind == "words" else None)
    (ids,) = tokenizer.encode(["the dogs run here"])
    assert "".join(tokenizer.decode(ids)) == "the dogs run here" and len(ids) >= 4
    assert tokenizer.decode([ids[0], tokenizer.end_id])[-1].strip() == end
    assert tokenizer.vocab_size > max(ids)


def test_the_end_token_in_a_text_is_text(save_pretrained):
    tokenizer = PretrainedTokenizer(name_or_path=save_pretrained("bytes"))
    before = tokenizer.identity()
    (ids,) = tokenizer.encode(["the <end> dog"])
    assert tokenizer.end_id not in ids and "".join(tokenizer.decode(ids)) == "the <end> dog"
    assert tokenizer.identity() == before


def test_a_long_document_is_encoded_whole_and_in_silence(save_pretrained, recwarn, caplog):
    tokenizer = PretrainedTokenizer(name_or_path=save_pretrained("bytes"))
    tokenizer.tokenizer.model_max_length = 8
    assert len(tokenizer.encode(["dog " * 50])[0]) > 40 and not recwarn.list and not caplog.records


def test_identities_differ_where_ids_would(save_pretrained):
    by_kind = [
        PretrainedTokenizer(name_or_path=save_pretrained(kind), end_token=None) for kind in ("bytes", "underscores")
    ]
    assert by_kind[0].identity() != by_kind[1].identity()
    assert TrainedTokenizer(vocab_size=300).identity() != TrainedTokenizer(vocab_size=301).identity()
    assert PlainIds(vocab_size=5, end_id=1).identity() != PlainIds(vocab_size=5, end_id=2).identity()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name_or_path": "a/b", "revision": "main"}, "a/b is not on this machine, and download is false. data.tokeni"),
        ({"name_or_path": "a/b"}, "a/b is no folder here, and a name on the hub needs a revision"),
        ({"name_or_path": "words", "revision": "main"}, "words is a folder, and has no revision: drop main"),
        ({"name_or_path": "words"}, r"has no end-of-sequence token: name its end_token"),
        ({"name_or_path": "words", "end_token": "</s>"}, r"end_token '</s>' is not in the vocabulary"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_an_error(save_pretrained, arguments, message):
    if arguments["name_or_path"] == "words":
        arguments = {**arguments, "name_or_path": save_pretrained("words")}
    with pytest.raises(ValueError, match=message):
        PretrainedTokenizer(**arguments)


def test_a_machine_without_network_says_so_at_once(monkeypatch):
    def unknown(*arguments, **options):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    start = time.perf_counter()
    with pytest.raises(ValueError, match="model a/b cannot be downloaded: .* does not answer .*data=python_stdlib"):
        PretrainedTokenizer(name_or_path="a/b", revision="main", download=True)
    assert time.perf_counter() - start < 10


def test_a_folder_without_a_tokenizer_is_an_error(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=str(tmp_path)):
        PretrainedTokenizer(name_or_path=str(tmp_path))


@pytest.mark.parametrize("end_id", [-1, 5])
def test_the_end_of_plain_ids_is_one_of_them(end_id):
    with pytest.raises(ValueError, match=rf"end_id must be in 0\.\.4, got {end_id}"):
        PlainIds(vocab_size=5, end_id=end_id)
