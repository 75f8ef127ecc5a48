"""Every site of whole models: what is folded is the steering on other inputs too, and most of it is folded."""

import pytest
import torch

from actsteer import Ablate, ActsteerError, Steerer, SteeringVector, find_sites, fold

transformers = pytest.importorskip("transformers")
D = 16


def opt():
    sizes = {"vocab_size": 37, "hidden_size": D, "num_hidden_layers": 2, "ffn_dim": 24, "num_attention_heads": 2}
    config = transformers.OPTConfig(**sizes, max_position_embeddings=32, word_embed_proj_dim=D, init_std=0.3)
    return transformers.OPTForCausalLM(config)


def bert():
    sizes = {"hidden_size": D, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.BertModel(transformers.BertConfig(vocab_size=37, **sizes, initializer_range=0.3))


def t5():
    sizes = {"vocab_size": 37, "d_model": D, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))


def inputs(model, rows, length, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = {"input_ids": torch.randint(3, 37, (rows, length), generator=generator)}
    if model.config.is_encoder_decoder:
        ids["decoder_input_ids"] = torch.randint(3, 37, (rows, length - 2), generator=generator)
    return ids


@pytest.mark.slow
@pytest.mark.parametrize(("build", "folded_at_least"), [(opt, 55), (bert, 100), (t5, 100)])
@pytest.mark.filterwarnings("ignore:.*did not run on verify_on")
def test_what_is_folded_holds_on_other_inputs(build, folded_at_least):
    torch.manual_seed(0)
    model = build().eval()
    known, other = inputs(model, 2, 6, seed=1), inputs(model, 3, 9, seed=2)
    count = 0
    for site in find_sites(model, lambda *_: True):
        for where in (site, f"{site}:in"):
            for intervention in (None, Ablate()):
                v = SteeringVector({where: torch.randn(D, generator=torch.Generator().manual_seed(3))})
                try:
                    folded = fold(model, v, verify_on=known, intervention=intervention)
                except ActsteerError:
                    continue
                with torch.no_grad(), Steerer(model, v, intervention=intervention):
                    steered = model(**other)[0]
                with torch.no_grad():
                    error = (folded(**other)[0] - steered).abs().max() / steered.abs().max()
                assert error < 1e-4, (where, intervention)
                count += 1
    print(f"{count} folded, none of them wrong on other inputs")
    assert count >= folded_at_least
