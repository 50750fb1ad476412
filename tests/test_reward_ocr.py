"""The reward that reads: comparing texts, and a small GOT-OCR2 that can be made to say a word."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GotOcr2Config, GotOcr2ForConditionalGeneration, GotOcr2Processor, PreTrainedTokenizerFast

from rdm_rl.pixels import to_pil
from rdm_rl.rewards.ocr import TextMatch, edit_distance, quoted_text, text_similarity

# Later versions of transformers give the processor that needs no torchvision a name of its own.
ImageProcessor: Any = getattr(transformers, "GotOcr2ImageProcessorPil", None) or transformers.GotOcr2ImageProcessor
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<imgpad>"]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, and the special ones."""
    tokenizer = Tokenizer(
        models.BPE({char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SPECIAL[0],
        pad_token=SPECIAL[0],
        additional_special_tokens=SPECIAL[1:],
        model_input_names=["input_ids", "attention_mask"],
    )


def save_tiny(folder: Path, says: str | None = None) -> Path:
    """Save a small model: with random weights, or one that says a word (no letter twice), ends, and then babbles."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = GotOcr2Config(
        # 64 x 64 patches of one pixel: the processor counts on 16 x 16 tokens after two halvings.
        vision_config={
            "hidden_size": 16,
            "output_channels": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 1,
            "window_size": 8,
            "global_attn_indexes": [],
            "mlp_dim": 16,
            "initializer_range": 0.5,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(tokenizer),
            "hidden_size": 264,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "initializer_range": 0.5,
            "tie_word_embeddings": False,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<imgpad>"),
        tie_word_embeddings=False,
    )
    model = GotOcr2ForConditionalGeneration(config).eval()
    model.lm_head.weight.data[config.image_token_index].zero_()  # Said by the network, it would stand for an image.
    if says is not None:
        # Without its layers, the network sees the last token only, so its head is a table of what follows what.
        layer = model.model.language_model.layers[0]
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
        size = len(tokenizer)
        model.model.language_model.embed_tokens.weight.data[:size] = torch.eye(size, 264)
        model.lm_head.weight.data.zero_()
        (start,) = tokenizer.encode("\n", add_special_tokens=False)
        end, babble = tokenizer.convert_tokens_to_ids(["<|im_end|>", "?"])
        chain = [start, *tokenizer.encode(says, add_special_tokens=False), end, babble, babble]
        for token, following in pairwise(chain):
            model.lm_head.weight.data[following, token] = 1
    model.save_pretrained(folder)
    GotOcr2Processor(ImageProcessor(size={"height": 64, "width": 64}), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("got") / "speaker", says="OPEN")


@pytest.fixture(scope="module")
def random_reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("got") / "random")


def says(*texts: str) -> TextMatch:
    return TextMatch(recogniser=lambda images: list(texts))


IMAGE = torch.zeros(1, 3, 8, 8)


def test_edit_distance() -> None:
    for first, second, distance in (
        ("", "", 0),
        ("abc", "", 3),
        ("abc", "abc", 0),
        ("flaw", "lawn", 2),
        ("intention", "execution", 5),
    ):
        assert edit_distance(first, second) == edit_distance(second, first) == distance, (first, second)


def test_similarity_is_the_distance_over_the_wanted_length() -> None:
    assert text_similarity("helo", "hello") == pytest.approx(1 - 1 / 5)
    assert text_similarity("", "hello") == 0
    assert text_similarity("something else altogether", "hello") == 0
    assert text_similarity("say hello twice", "hello") == 1
    assert text_similarity("hello!", "hello", allow_extra_text=False) == pytest.approx(1 - 1 / 5)


def test_quoted_text() -> None:
    for prompt, text in (
        ("a cat", ""),
        ('a sign "OPEN"', "OPEN"),
        ("a sign “Caffè Roma”", "Caffè Roma"),
        ("ein Schild «Halt»", "Halt"),
        ("看板「営業中」", "営業中"),
        ('"A" above "B"', "A B"),
        ("the dog's 'bowl'", ""),
        ('an empty "" sign', ""),
    ):
        assert quoted_text(prompt) == text


def test_prompts_that_ask_for_no_text_are_not_applicable() -> None:
    seen = []

    def read(images: torch.Tensor) -> list[str]:
        seen.append(images)
        return ["open", "opem"]

    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 8, 8) / 4
    values = TextMatch(recogniser=read)(images, ["a cat", 'a "OPEN" sign', 'only " "', 'a "OPEN" door'])
    assert values == [None, 1.0, None, 0.75]
    assert torch.equal(seen[0], images[[1, 3]])
    assert TextMatch(recogniser=read)(IMAGE, ["a cat"]) == [None]
    assert len(seen) == 1, "nothing is read if no sample asks"


def test_the_column_goes_before_the_prompt() -> None:
    images = IMAGE.expand(3, 3, 8, 8)
    prompts = ['"wrong"'] * 3
    assert says("right")(images, prompts, text=["right", None, ""]) == [1.0, None, None]
    # Others are ignored.
    assert says("a")(IMAGE, ['"a"'], style=["oil"]) == [1.0]


def test_case_spaces_and_extra_text_count_only_if_asked() -> None:
    prompts = ['"Open Now"']
    read = "open\nnow"
    assert says(read)(IMAGE, prompts) == [1.0]
    assert TextMatch(recogniser=lambda images: [read], ignore_case=False)(IMAGE, prompts) == [pytest.approx(1 - 2 / 7)]
    assert TextMatch(recogniser=lambda images: ["opennow"], ignore_spaces=False)(IMAGE, prompts) == [
        pytest.approx(1 - 1 / 8)
    ]
    # A line break is a space.
    assert TextMatch(recogniser=lambda images: [read], ignore_spaces=False)(IMAGE, prompts) == [1.0]
    # And so does extra text.
    assert says("open 24 hours")(IMAGE, ['"open"']) == [1.0]
    assert TextMatch(recogniser=lambda images: ["open 2"], allow_extra_text=False)(IMAGE, ['"open"']) == [0.75]


def test_a_recogniser_that_answers_otherwise_is_refused_and_so_are_two_readers() -> None:
    answers: list[list[Any]] = [["a", "b"], [], [None]]
    for answer in answers:
        with pytest.raises(TypeError, match="one string each"):
            TextMatch(recogniser=lambda images, answer=answer: answer)(IMAGE, ['"a"'])
    with pytest.raises(ValueError, match="only one can read"):
        TextMatch("folder", recogniser=lambda images: [""])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_reads_up_to_its_end_token(speaker: Path, dtype: str) -> None:
    reward = TextMatch(speaker, dtype=dtype)
    images = torch.rand(3, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    # Extra text would cost something, so the babble after the end would show.
    reward.allow_extra_text = False
    assert reward(images, ['"open"', "no text", '"opened"']) == [1.0, None, pytest.approx(1 - 2 / 6)]


def test_reading_stops_after_so_many_tokens_and_needs_no_gradient(speaker: Path) -> None:
    assert TextMatch(speaker, max_new_tokens=2)(IMAGE, ['"open"']) == [0.5]
    assert not TextMatch.differentiable
    assert TextMatch(speaker, max_new_tokens=2)(IMAGE.clone().requires_grad_(), ['"open"']) == [0.5]


def test_reading_is_greedy_on_what_the_processor_makes_of_the_image(random_reader: Path) -> None:
    images = torch.rand(2, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    reward = TextMatch(random_reader, max_new_tokens=6)
    network = reward.load().eval()
    processor = GotOcr2Processor.from_pretrained(random_reader)
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    expected = []
    for picture in to_pil(images):  # One at a time, and the whole text again for each token.
        inputs = dict(processor(images=[picture], return_tensors="pt"))
        tokens: list[int] = []
        while len(tokens) < 6 and end not in tokens:
            logits = network(**inputs).logits[0, -1]
            tokens.append(int(logits.argmax()))
            inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([tokens[-1:]])], 1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        expected.append(processor.tokenizer.decode(tokens, skip_special_tokens=True))
    assert reward.read(network, images) == expected
    assert expected[0] != expected[1]  # The images matter.
    assert reward(images, ['"a"', '"a"'], text=expected) == [1.0, 1.0]
