"""Audio: arrays and files become what the model's feature extractor makes of them."""

from __future__ import annotations

import copy
import sys
import wave
from types import ModuleType, SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import transformers as hf
from tiny_models import tiny_llama

from optimum_fp8 import FP8Config, calibrate, prepare
from optimum_fp8.calibration import ModelFacts, facts_of
from optimum_fp8.calibration.rows.audio import decoded
from optimum_fp8.errors import FP8CalibrationError
from optimum_fp8.lifecycle.state import state_of

RATE = 16000


def tone(seconds=0.1, pitch=440.0, rate=RATE):
    return (0.5 * np.sin(np.arange(int(seconds * rate)) / rate * 2 * np.pi * pitch)).astype(np.float32)


def sample(*arguments, rate=RATE, **options):
    return {"array": tone(*arguments, rate=rate, **options), "sampling_rate": rate}


def write_wav(path, array, rate=RATE, width=2, channels=1):
    """A WAV file of whole numbers."""
    scaled = np.round(np.repeat(array, channels) * (2 ** (8 * width - 1) - 1)).astype(np.int64)
    scaled = scaled + 128 if width == 1 else scaled
    data = b"".join(int(value).to_bytes(width, "little", signed=width > 1) for value in scaled)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(data)
    return str(path)


def whisper():
    sizes = {"d_model": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 64}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = hf.WhisperConfig(**sizes, **layers, **tokens, num_mel_bins=8, max_source_positions=50)
    return hf.WhisperForConditionalGeneration(config).eval()


def wav2vec2():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    convolutions = {"conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2}
    groups = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "vocab_size": 32}
    config = hf.Wav2Vec2Config(**sizes, **convolutions, **groups, feat_extract_norm="layer", do_stable_layer_norm=True)
    return hf.Wav2Vec2ForCTC(config).eval()


EXTRACTORS = {
    "whisper": lambda **options: hf.WhisperFeatureExtractor(feature_size=8, chunk_length=1, **options),
    "wav2vec2": lambda **options: hf.Wav2Vec2FeatureExtractor(return_attention_mask=True, **options),
}
MODELS = {"whisper": whisper, "wav2vec2": wav2vec2}
ENCODERS = {
    "whisper": "model.encoder.layers.0.fc1",
    "wav2vec2": "wav2vec2.encoder.layers.0.feed_forward.intermediate_dense",
}


@pytest.mark.core
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("make", [list, datasets.Dataset.from_list], ids=["list", "Dataset"])
def test_arrays_go_through_the_feature_extractor(name, make, load):
    extractor, arrays = EXTRACTORS[name](), [tone(0.1), tone(0.1, 200.0)]
    rows = make([{"audio": {"array": array, "sampling_rate": RATE}, "label": 1} for array in arrays])
    (batch,) = load(rows, facts_of(MODELS[name]()), processor=extractor, batch_size=2)
    expected = extractor(arrays, sampling_rate=RATE, return_tensors="pt")
    assert set(batch) == set(expected) and all(torch.equal(batch[key], expected[key]) for key in expected)


@pytest.mark.core
@pytest.mark.parametrize("name", MODELS)
def test_models_are_calibrated(name):
    rows = [sample(0.1), sample(0.3, 200.0), sample(0.2, 700.0)]
    config = FP8Config(dataset=rows, processor=EXTRACTORS[name](), batch_size=2, ignore_modules_wo_measures=True)
    model = calibrate(prepare(MODELS[name](), config))
    measured = state_of(model).measurements
    encoder = (
        "model.encoder.layers.0.fc1"
        if name == "whisper"
        else "wav2vec2.encoder.layers.0.feed_forward.intermediate_dense"
    )
    assert measured.samples == 3 and measured.range(encoder) is not None
    if name == "whisper":  # which goes on as in generation
        assert measured.range("model.decoder.layers.0.fc1") is not None


def test_rows_of_different_lengths_are_padded_with_a_mask_of_frames_or_kept_apart(load):
    rows = [sample(0.1), sample(0.05)]
    apart = load(rows, facts_of(wav2vec2()), processor=EXTRACTORS["wav2vec2"](), batch_size=2)
    assert [tuple(batch["input_values"].shape) for batch in apart] == [(1, 1600), (1, 800)]
    (batch,) = load(rows, facts_of(whisper()), processor=EXTRACTORS["whisper"](), batch_size=2)
    assert batch["input_features"].shape == (2, 8, 100), "Whisper's are of one length"
    frames = hf.SeamlessM4TFeatureExtractor(feature_size=8, num_mel_bins=8)
    model = ModelFacts(inputs=frozenset({"input_features", "attention_mask"}), main_input="input_features")
    (batch,) = load(rows, model, processor=frames, batch_size=2)
    assert batch["attention_mask"].shape == batch["input_features"].shape[:2] and not bool(
        batch["attention_mask"].all()
    )


@pytest.mark.core
def test_padding_is_not_measured():
    def measured(batch_size):
        torch.manual_seed(0)
        rows = [sample(0.3), sample(0.05, 200.0)]
        config = FP8Config(dataset=rows, processor=EXTRACTORS["wav2vec2"](), batch_size=batch_size)
        tensors = state_of(calibrate(prepare(wav2vec2(), config))).measurements.tensors
        return {key: int(observer.statistics()["count"]) for key, observer in tensors.items()}

    assert measured(2) == measured(1)


@pytest.mark.core
@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_wav_files_are_decoded(width, channels, tmp_path):
    path = write_wav(tmp_path / "tone.wav", tone(), width=width, channels=channels)
    found = decoded(path, "here", "", RATE)
    assert found.rate == RATE and found.array.shape == tone().shape
    assert np.abs(found.array - tone()).max() <= 2.0 ** (2 - 8 * width)
    with open(path, "rb") as file:
        same = decoded({"bytes": file.read(), "path": None}, "here", "", RATE)
    assert np.array_equal(found.array, same.array)


def test_paths_and_columns_of_audio(load, tmp_path):
    path, extractor = write_wav(tmp_path / "tone.wav", tone()), EXTRACTORS["wav2vec2"]()
    model = facts_of(wav2vec2())
    column = datasets.Dataset.from_dict({"audio": [path]}).cast_column("audio", datasets.Audio(sampling_rate=RATE))
    found = [
        load(rows, model, processor=extractor) for rows in ([{"speech": path}], [path], [tmp_path / "tone.wav"], column)
    ]
    assert all(torch.equal(batch["input_values"], found[0][0]["input_values"]) for (batch,) in found)


def test_a_decoder_of_torchcodec(load):
    class Decoder:
        def get_all_samples(self):
            return SimpleNamespace(data=torch.from_numpy(tone())[None], sample_rate=RATE)

    extractor = EXTRACTORS["wav2vec2"]()
    (batch,) = load([{"audio": Decoder()}], facts_of(wav2vec2()), processor=extractor)
    assert torch.equal(
        batch["input_values"], extractor(tone(), sampling_rate=RATE, return_tensors="pt")["input_values"]
    )


def test_torchcodec_decodes_where_it_is_installed_and_resamples(load, tmp_path, monkeypatch):
    (tmp_path / "tone.flac").write_bytes(b"fLaC")
    asked = []

    class AudioDecoder:
        def __init__(self, source, sample_rate, num_channels):
            asked.append((source, sample_rate, num_channels))

        def get_all_samples(self):
            return SimpleNamespace(data=torch.from_numpy(tone())[None], sample_rate=asked[-1][1])

    decoders = ModuleType("torchcodec.decoders")
    decoders.AudioDecoder = AudioDecoder
    monkeypatch.setattr("optimum_fp8.calibration.rows.audio.find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "torchcodec", ModuleType("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", decoders)
    load([tmp_path / "tone.flac"], facts_of(wav2vec2()), processor=EXTRACTORS["wav2vec2"](sampling_rate=8000))
    assert asked == [(str(tmp_path / "tone.flac"), 8000, 1)]


@pytest.mark.core
@pytest.mark.parametrize(
    "value, message",
    [
        (
            sample(rate=8000),
            "has a sampling rate of 8000 Hz, and Wav2Vec2FeatureExtractor takes 16000: resample",
        ),
        (None, "is None, not audio: leave such rows out"),
        ("gone.wav", "is 'gone.wav', and there is no such file"),
        ({"array": [], "sampling_rate": RATE}, "is empty"),
        ({"array": ["x"], "sampling_rate": RATE}, "is no audio: expected numbers and their sampling_rate"),
        ({"array": np.zeros((2, 2, 2)), "sampling_rate": RATE}, r"has an array of shape \(2, 2, 2\): expected one"),
        (3, "is of type int, not audio"),
    ],
    ids=["rate", "none", "no file", "empty", "no numbers", "shape", "number"],
)
def test_what_is_no_audio_is_named(value, message, load):
    with pytest.raises(FP8CalibrationError, match=f"sample 1, column 'audio' {message}"):
        load([{"audio": sample()}, {"audio": value}], facts_of(wav2vec2()), processor=EXTRACTORS["wav2vec2"]())


def test_files_that_only_torchcodec_decodes(load, tmp_path):
    (tmp_path / "tone.mp3").write_bytes(b"ID3")
    with pytest.raises(FP8CalibrationError, match=r"tone.mp3, column 'audio' is no WAV file .*pip install torchcodec"):
        load([tmp_path / "tone.mp3"], facts_of(wav2vec2()), processor=EXTRACTORS["wav2vec2"]())


def test_the_wrong_models_and_processors_are_named(load, tokenizer):
    with pytest.raises(FP8CalibrationError, match="has audio in 'audio', which the model does not take: expected text"):
        load([{"audio": sample()}], facts_of(tiny_llama()), tokenizer=tokenizer)
    with pytest.raises(FP8CalibrationError, match="column 'audio' holds audio, and .* is no feature extractor: pass"):
        load([{"audio": sample()}], facts_of(whisper()), processor=tokenizer)
    with pytest.raises(FP8CalibrationError, match="is text, and the model takes 'input_values', not .* pass audio, or"):
        load(["a"], facts_of(wav2vec2()), tokenizer=tokenizer)


def qwen2_audio():
    size = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    text = hf.Qwen2Config(**size, num_key_value_heads=2, vocab_size=16, max_position_embeddings=128)
    encoder = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}
    audio = hf.Qwen2AudioEncoderConfig(**encoder, num_mel_bins=8, max_source_positions=50)
    config = hf.Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=2)
    return hf.Qwen2AudioForConditionalGeneration(config).eval()


AUDIO_TEMPLATE = (
    "{% for message in messages %}{{ message.role }} : {% for part in message.content %}{% if part.type == 'audio' %}"
    " <|audio_bos|> <|AUDIO|> <|audio_eos|> {% else %}{{ part.text }}{% endif %} {% endfor %}{% endfor %}"
)


@pytest.mark.parametrize("form", ["caption", "messages", "in the messages"])
def test_models_that_hear_and_read(form, load, tokenizer):
    own = copy.deepcopy(tokenizer)
    own.add_special_tokens({"additional_special_tokens": ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]})
    processor = hf.Qwen2AudioProcessor(EXTRACTORS["whisper"](), own, chat_template=AUDIO_TEMPLATE)
    turn = {"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "a b"}]}
    inside = {"role": "user", "content": [{"type": "audio", "audio": sample()}, {"type": "text", "text": "a b"}]}
    rows = {
        "caption": {"audio": sample(), "text": "a b"},
        "messages": {"audio": sample(), "messages": [turn]},
        "in the messages": {"messages": [inside]},
    }
    (batch,) = load([rows[form]], facts_of(qwen2_audio()), processor=processor)
    text = processor.apply_chat_template([turn], tokenize=False)
    expected = processor(text=[text], audio=[tone()], sampling_rate=RATE, return_tensors="pt")
    assert set(batch) == set(expected) and all(torch.equal(batch[key], expected[key]) for key in expected)
    assert "input_features" in batch
    slow = {"audio": sample(rate=8000), "text": "a"}
    with pytest.raises(FP8CalibrationError, match="sample 1, column 'audio' has a sampling rate of 8000 Hz"):
        load([rows["caption"], slow], facts_of(qwen2_audio()), processor=processor)
