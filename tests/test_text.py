"""Captions as the UNet reads them, against diffusers' own pipelines."""

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from trainer.models import text as texts
from trainer.models.model import Model
from trainer.objective import encoding

CPU = torch.device("cpu")
SHORT = ["a red card", "", "two cats and a dog, watercolour"]
LONG = " ".join(f"word{number}" for number in range(90))


@torch.no_grad()
def test_sdxl_captions_are_encoded_as_its_pipeline_does(composed):
    config = composed().model
    encoder = Model(config, CPU).load_text_encoders()
    pipeline = StableDiffusionXLPipeline.from_pretrained(config.path)
    expected = pipeline.encode_prompt([*SHORT, LONG], do_classifier_free_guidance=False)
    text = encoder([*SHORT, LONG])  # the long one is cut
    assert torch.equal(text.prompt, expected[0])
    assert torch.equal(text.pooled, expected[2])


@torch.no_grad()
def test_sd15_captions_are_encoded_as_its_pipeline_does(composed, sd15):
    config = composed("model=sd15", f"model.path={sd15}").model
    encoder = Model(config, CPU).load_text_encoders()
    pipeline = StableDiffusionPipeline.from_pretrained(sd15)
    text = encoder(SHORT)
    assert text.pooled is None
    expected = pipeline.encode_prompt(SHORT, CPU, 1, False)[0]
    assert torch.allclose(text.prompt, expected, atol=1e-6)


@torch.no_grad()
def test_skipped_layers_are_left_out_before_the_last_normalisation(composed, sd15):
    config = composed("model=sd15", f"model.path={sd15}", "model.clip_skip=1").model
    text = Model(config, CPU).load_text_encoders()(SHORT)
    pipeline = StableDiffusionPipeline.from_pretrained(sd15)
    encoder, tokenizer = pipeline.text_encoder, pipeline.tokenizer
    ids = tokenizer(SHORT, padding="max_length", return_tensors="pt").input_ids
    tower = getattr(encoder, "text_model", encoder).encoder  # transformers 4 has a level more
    tower.layers = tower.layers[:-1]
    assert torch.allclose(text.prompt, encoder(ids).last_hidden_state, atol=1e-6)


def test_skipped_layers_are_not_trained(composed, sd15):
    config = composed("model=sd15", f"model.path={sd15}", "model.clip_skip=1").model
    encoder = Model(config, CPU).load_text_encoders()
    tower = encoder.encoders["text_encoder"]
    tower.requires_grad_(True)
    encoder.freeze_unused()
    encoder(SHORT).prompt.sum().backward()
    for name, p in tower.named_parameters():
        assert p.requires_grad == (p.grad is not None), name


@torch.no_grad()
def test_no_prompt_is_what_the_pipeline_takes_for_it(composed, sd15):
    """SDXL takes zeros, Stable Diffusion 1.5 the encoded empty caption."""
    text = Model(composed().model, CPU).load_text_encoders()([None, "a card"])
    assert not text.prompt[0].any()
    assert not text.pooled[0].any()
    assert text.prompt[1].all()
    config = composed("model=sd15", f"model.path={sd15}").model
    text = Model(config, CPU).load_text_encoders()([None, ""])
    assert torch.equal(text.prompt[0], text.prompt[1])
    assert text.prompt[0].any()


@torch.no_grad()
def test_chunks_read_on_where_a_caption_would_be_cut(composed):
    one = Model(composed().model, CPU).load_text_encoders()
    two = Model(composed("model.prompt_chunks=2").model, CPU).load_text_encoders()
    tokenizer = two._tokenizers["text_encoder"]
    ids = tokenizer(LONG, add_special_tokens=False).input_ids
    assert len(ids) > 75
    head, tail = tokenizer.decode(ids[:75]), tokenizer.decode(ids[75:150])
    text = two(["a card", LONG])
    assert text.prompt.shape[1] == 2 * 75 + 2
    parts = one([head, tail])
    assert torch.allclose(text.prompt[1, :76], parts.prompt[0, :76], atol=1e-6)
    assert torch.allclose(text.prompt[1, 76:], parts.prompt[1, 1:], atol=1e-6)
    assert torch.allclose(text.pooled[1], parts.pooled[0], atol=1e-6)
    # an empty second chunk does not change a short caption
    assert torch.allclose(text.prompt[0, :76], one(["a card"]).prompt[0, :76], atol=1e-6)


def test_captions_with_too_few_characters_to_be_cut_are_not_made_into_tokens(composed, monkeypatch):
    counted = []
    ids = texts.token_ids
    monkeypatch.setattr(
        texts, "token_ids", lambda of, caption: counted.append(caption) or ids(of, caption)
    )
    model = Model(composed().model, CPU)
    dense = ["!" * 75, "!a" * 38, "\u1e9b\u0323" * 37]  # about one token per character, and several
    every = [*SHORT, LONG, "x" * 75, *dense]
    cut, room = encoding.cut_captions(model, every)
    assert counted == [LONG, *dense[1:]]
    tokenizer = texts.tokenizer(model.origin, "text_encoder")
    found = {caption: len(ids(tokenizer, caption)) for caption in every}
    assert cut == {caption: number for caption, number in found.items() if number > room}
    assert cut.keys() == {LONG, *dense[1:]}
    assert all(found[caption] <= len(caption) for caption in every if caption.isascii())
