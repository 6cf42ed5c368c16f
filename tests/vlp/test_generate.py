"""Decoding equals transformers' on shared weights, with and without a cache; samples stay in the nucleus."""

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.generation import TemperatureLogitsWarper, TopPLogitsWarper

from encoders import PatchConfig, TextConfig
from encoders.stack_weights import rename_bert
from encoders.types import Tokens, Vocabulary
from objectives import LmConfig
from objectives.base import Draw
from vlp.decoder import DecoderConfig
from vlp.fusion import NoFusionConfig
from vlp.generate import GenerationConfig, generate, generate_text, nucleus, trim
from vlp.model import Model, ModelConfig

WORDS = Vocabulary(size=40, pad=1, cls=2, sep=3, mask=4, bos=2, eos=3)
SIZES = {"width": 32, "layers": 2, "heads": 4}


@pytest.fixture(scope="module")
def pair() -> tuple[BertLMHeadModel, Model]:
    """BERT's decoder with wide random weights (so that texts differ), and our decoder filled from it."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=16,
        is_decoder=True,
        add_cross_attention=True,
        initializer_range=0.4,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=1,
    )
    theirs = BertLMHeadModel(config).eval()
    with torch.no_grad():
        theirs.cls.predictions.bias[WORDS.eos] += 4.0  # some texts are to end before the limit
    vision = PatchConfig(model="vit_tiny_patch16_224", image_size=16, patch_size=8, width=32, depth=1, heads=4)
    text = TextConfig(**SIZES, vocabulary_size=40, max_length=16)
    ours = Model(
        ModelConfig(vision=vision, text=text, fusion=NoFusionConfig(), decoder=DecoderConfig(**SIZES)),
        {"lm": LmConfig()},
    ).eval()
    assert ours.decoder is not None
    state = theirs.state_dict()
    renamed = rename_bert(state)
    blocks = {name: tensor for name, tensor in renamed.items() if name.startswith("blocks.")}
    missing, unexpected = ours.decoder.load_state_dict(blocks, strict=False)
    assert not unexpected and all(name.startswith("embeddings.") for name in missing)
    ours.text.embeddings.load_state_dict(
        {n.removeprefix("embeddings."): t for n, t in renamed.items() if "embeddings." in n}
    )
    head = {"dense.": "transform.dense.", "norm.": "transform.LayerNorm.", "decoder.": "decoder."}
    ours.objectives["lm"].head.load_state_dict(
        {
            our + kind: state[f"cls.predictions.{their}{kind}"]
            for our, their in head.items()
            for kind in ("weight", "bias")
        }
    )
    return theirs, ours


@pytest.fixture(scope="module")
def memory() -> Tokens:
    states = torch.randn(5, 6, 32, generator=torch.Generator().manual_seed(1))
    keep = torch.arange(6)[None] < torch.tensor([6, 4, 5, 2, 6])[:, None]
    return Tokens(states, keep, states[:, 0])


def reference(model: BertLMHeadModel, memory: Tokens, prompt: torch.Tensor, config: GenerationConfig):
    cache = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
    beam, draws = config.method == "beam", config.method == "nucleus"
    sampling = {"top_p": config.top_p, "temperature": config.temperature, "top_k": 0} if draws else {}
    return model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        encoder_hidden_states=memory.states,
        encoder_attention_mask=memory.keep.long(),
        past_key_values=cache,
        do_sample=draws,
        num_beams=config.beams if beam else 1,
        max_length=config.max_length,
        min_length=config.min_length,
        repetition_penalty=config.repetition_penalty,
        return_dict_in_generate=True,
        output_scores=True,
        **({"length_penalty": config.length_penalty, "early_stopping": config.early_stopping} if beam else {}),
        **sampling,
    )


CASES = {
    "greedy": {},
    "greedy, min length": {"min_length": 9},
    "greedy, repetition penalty": {"repetition_penalty": 1.7},
    "greedy, both": {"min_length": 9, "repetition_penalty": 0.8},
    "beam": {"method": "beam"},
    "beam, early stopping": {"method": "beam", "early_stopping": True},
    "beam, min length": {"method": "beam", "min_length": 10},
    "beam, repetition penalty": {"method": "beam", "repetition_penalty": 1.7, "beams": 4},
    "beam, by log-probability alone": {"method": "beam", "length_penalty": 0.0},
    "beam, short texts": {"method": "beam", "length_penalty": -1.0},
    "beam, long texts": {"method": "beam", "length_penalty": 2.0, "beams": 5},
    "beam, BLIP": {"method": "beam", "min_length": 6, "repetition_penalty": 1.1, "early_stopping": True},
}


PROMPTS = {"bos": [[2]] * 5, "prompt": [[2, 9, 7], [2, 30, 11], [2, 8, 8], [2, 21, 5], [2, 6, 35]]}


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
def test_equals_transformers(pair, memory, prompt, settings):
    theirs, ours = pair
    config = GenerationConfig(**({"max_length": 14} | settings))
    prompt = torch.tensor(prompt)
    expected = reference(theirs, memory, prompt, config)
    for use_cache in (True, False):
        ids, scores = generate_text(ours, memory, WORDS, config, prompt, use_cache=use_cache)
        assert ids == trim(expected.sequences, prompt.shape[1], WORDS.eos)
        if config.method == "beam":
            torch.testing.assert_close(scores, expected.sequences_scores, atol=1e-4, rtol=1e-4)


NUCLEI = {
    "all words": {"top_p": 1.0},
    "nucleus": {"top_p": 0.8, "temperature": 1.5},
    "BLIP": {"top_p": 0.9, "min_length": 8, "repetition_penalty": 1.1},
}


@pytest.mark.parametrize("settings", NUCLEI.values(), ids=NUCLEI.keys())
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
def test_nucleus_equals_transformers_with_the_same_draws(pair, memory, prompt, settings, monkeypatch):
    """Their draw of a word is replaced by ours: what is drawn from stays theirs."""
    theirs, ours = pair
    prompt, written = torch.tensor(prompt), set()
    for seed in range(3):
        config = GenerationConfig(method="nucleus", max_length=14, seed=seed, **settings)
        length = iter(range(prompt.shape[1], 14))
        with monkeypatch.context() as patched:
            patched.setattr(
                torch,
                "multinomial",
                lambda weights, num_samples, seed=seed, length=length: Draw(seed, next(length)).categorical(
                    "generate.nucleus", weights
                )[:, None],
            )
            expected = trim(reference(theirs, memory, prompt, config).sequences, prompt.shape[1], WORDS.eos)
        for use_cache in (True, False):
            assert generate_text(ours, memory, WORDS, config, prompt, use_cache=use_cache)[0] == expected
        written |= {tuple(text) for text in expected}
    assert len(written) > 10, "the draws differ"


@pytest.mark.parametrize("top_p", [0.3, 0.75, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_what_is_drawn_from_equals_transformers_warpers(top_p, temperature):
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(3)) * 3
    warped = TemperatureLogitsWarper(temperature)(None, logits)
    expected = (TopPLogitsWarper(top_p)(None, warped) if top_p < 1 else warped).softmax(1)
    kept = nucleus(logits / temperature, top_p)
    assert torch.equal(kept > 0, expected > 0)
    torch.testing.assert_close(kept / kept.sum(1, keepdim=True), expected, atol=1e-6, rtol=1e-5)


def test_the_cases_end_early_and_late(pair, memory):
    """The comparison above covers texts that end by eos and texts that reach the limit."""
    lengths = [
        len(text)
        for s in CASES.values()
        for text in generate_text(pair[1], memory, WORDS, GenerationConfig(**({"max_length": 14} | s)))[0]
    ]
    assert min(lengths) < 10 and max(lengths) == 14


@pytest.mark.parametrize("method", ["greedy", "beam", "nucleus"])
def test_cache_changes_nothing(pair, memory, method):
    config = GenerationConfig(method=method, max_length=12, temperature=1.5)
    rows = torch.tensor([4, 0, 0, 2])  # several texts of one memory row
    with_cache = generate_text(pair[1], memory, WORDS, config, rows=rows)
    without = generate_text(pair[1], memory, WORDS, config, rows=rows, use_cache=False)
    assert with_cache[0] == without[0]
    torch.testing.assert_close(with_cache[1], without[1])


def test_beam_of_one_is_greedy(pair, memory):
    greedy = generate_text(pair[1], memory, WORDS, GenerationConfig(max_length=10))
    beam = generate_text(pair[1], memory, WORDS, GenerationConfig(method="beam", beams=1, max_length=10))
    assert greedy[0] == beam[0]
    torch.testing.assert_close(greedy[1], beam[1])


class Fixed:
    """A model whose next word does not depend on what it has read."""

    def __init__(self, probabilities: list[float]) -> None:
        self.logits = torch.tensor(probabilities).log()

    def step(self, ids):
        return self.logits.expand(ids.shape[0], -1)

    def reorder(self, index):
        pass


def test_nucleus_is_the_smallest_set_and_frequencies_are_right():
    probabilities = [0.02, 0.4, 0.1, 0.08, 0.3, 0.1]
    kept = nucleus(torch.tensor([probabilities]).log(), 0.75)
    assert kept.nonzero()[:, 1].tolist() in ([1, 2, 4], [1, 4, 5])  # 0.4 + 0.3 < 0.75 <= 0.8; the tie goes to either
    config = GenerationConfig(method="nucleus", top_p=0.6, max_length=41, seed=3)
    found = generate(Fixed(probabilities), torch.zeros(500, 1, dtype=torch.long), config, eos=0, pad=0)
    written = found.ids[:, 1:]
    assert set(written.unique().tolist()) == {1, 4}
    share = (written == 1).float().mean()
    assert abs(share - 4 / 7) < 4 * (4 / 7 * 3 / 7 / written.numel()) ** 0.5  # four standard errors
    again = generate(Fixed(probabilities), torch.zeros(500, 1, dtype=torch.long), config, eos=0, pad=0)
    assert torch.equal(found.ids, again.ids)
    fewer = generate(Fixed(probabilities), torch.zeros(7, 1, dtype=torch.long), config, eos=0, pad=0)
    assert torch.equal(found.ids[:7], fewer.ids)  # a row's draws do not depend on how many rows there are
    other = generate(
        Fixed(probabilities), torch.zeros(500, 1, dtype=torch.long), config.model_copy(update={"seed": 4}), eos=0, pad=0
    )
    assert not torch.equal(found.ids, other.ids)


def test_rows_are_padded_after_the_end():
    found = generate(
        Fixed([0.5, 0.5]),
        torch.zeros(20, 1, dtype=torch.long),
        GenerationConfig(method="nucleus", top_p=1.0, max_length=12),
        eos=1,
        pad=9,
    )
    for row in found.ids.tolist():
        end = row.index(1) + 1 if 1 in row else len(row)
        assert set(row[end:]) <= {9} and 9 not in row[:end]


def test_mistakes_are_named(pair, memory):
    ours = pair[1]
    with pytest.raises(ValueError, match="max_length 17 is more than the 16 positions"):
        generate_text(ours, memory, WORDS, GenerationConfig(max_length=17))
    with pytest.raises(ValueError, match="leaves no room after a prompt of 4 ids"):
        generate_text(ours, memory, WORDS, GenerationConfig(max_length=4), torch.full((5, 4), 2))
    with pytest.raises(ValueError, match="cannot write text"):
        generate_text(ours, memory, WORDS, GenerationConfig(max_length=9), objective="other")


class Chain:
    """A model whose next word depends on the last word and on its place, by one table for all rows."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits, self.read = logits, 0  # [L, V, V]

    def step(self, ids):
        self.read += ids.shape[1]
        return self.logits[self.read - 1, ids[:, -1]]

    def reorder(self, index):
        pass


def beam_of_transformers_4(logits, prompt, beams, limit, eos, penalty, min_length, early):
    """Beam search of one text as transformers 4.15 words it, with a list of finished texts."""
    running, done = [(0.0, prompt)], []
    while True:
        length, candidates = len(running[0][1]), []
        for total, text in running:
            words = logits[length - 1, text[-1]].log_softmax(0)
            candidates += [
                (total + score, [*text, word])
                for word, score in enumerate(words.tolist())
                if word != eos or length >= min_length
            ]
        candidates = sorted(candidates, key=lambda one: -one[0])[: 2 * beams]
        running = []
        for rank, (total, text) in enumerate(candidates):
            if text[-1] != eos:
                running.append((total, text))
            elif rank < beams:
                done.append((total / length**penalty, text))
            if len(running) == beams:
                break
        done = sorted(done, key=lambda one: -one[0])[:beams]
        enough = len(done) == beams and (early or done[-1][0] >= candidates[0][0] / length**penalty)
        if enough or length + 1 == limit:
            left = [] if enough else [(total / (length + 1) ** penalty, text) for total, text in running]
            return max(done + left, key=lambda one: one[0])


@pytest.mark.parametrize("early", [False, True])
def test_scores_over_all_ids_are_those_of_transformers_4(early):
    generator, differs = torch.Generator().manual_seed(0), 0
    for draw in range(40):
        logits = torch.randn(9, 12, 12, generator=generator) * 2
        logits[:, :, 3] += 1.0  # texts are to end before the limit now and then
        prompt = [2, 7, 5, 9][: 1 + draw % 4]
        penalty, beams = [1.0, 0.5, 2.0][draw % 3], 2 + draw % 3
        wanted, text = beam_of_transformers_4(logits, prompt, beams, 9, 3, penalty, 5, early)
        settings = {"method": "beam", "beams": beams, "max_length": 9, "min_length": 5, "length_penalty": penalty}
        config = GenerationConfig(**settings, early_stopping=early, score_length="all")
        found = generate(Chain(logits), torch.tensor([prompt]), config, eos=3, pad=0)
        assert trim(found.ids, len(prompt), 3) == [text]
        torch.testing.assert_close(found.scores, torch.tensor([wanted]), atol=1e-4, rtol=1e-4)
        now = config.model_copy(update={"score_length": "written"})
        differs += trim(generate(Chain(logits), torch.tensor([prompt]), now, eos=3, pad=0).ids, len(prompt), 3) != [
            text
        ]
    assert differs > 0


def test_own_prompt_is_read_and_left_out(pair, memory):
    ours = pair[1]
    prompt = torch.tensor([[WORDS.bos, 9, 7]]).expand(5, -1)
    given, scores = generate_text(ours, memory, WORDS, GenerationConfig(max_length=12), prompt)
    lm = ours.objectives["lm"]
    plain, lm.config = lm.config, lm.config.model_copy(update={"prompt": (9, 7)})
    found, same_scores = generate_text(ours, memory, WORDS, GenerationConfig(max_length=12))
    lm.config = plain
    assert [text[:1] + text[3:] for text in given] == found
    torch.testing.assert_close(scores, same_scores)
