"""The architectures that people fine-tune: tiny, each with a batch that has a loss, and in a size that the Hub has.

`tests/integrations/test_zoo.py` trains the tiny ones in every mode. The real ones are made on the meta device, from
their configurations and without weights, and the table of docs/architectures.md counts what of them is projected.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY, LENGTH, ROWS = 96, 12, 2
HIDDEN = 32

Batch = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Args:
        name: transformers' model type, or the class.
        group: the heading that it comes under.
        size: the model of the Hub that `real` has the size of.
        tiny: makes the model that is trained, in float32.
        batch: makes what it is trained on from the model: keywords of its forward pass, which returns a `.loss`.
        real: makes the model of that size; called under `torch.device("meta")`.
    """

    name: str
    group: str
    size: str
    tiny: Callable[[], nn.Module]
    batch: Callable[[Any], Batch]
    real: Callable[[], nn.Module]

    def make(self) -> tuple[nn.Module, Batch]:
        """The tiny model and its batch, the same each time."""
        torch.manual_seed(0)
        model = self.tiny()
        return model, self.batch(model)

    def make_real(self) -> nn.Module:
        """The real model, without weights."""
        with torch.device("meta"):
            return self.real()


# ---- batches


def _ids(rows: int = ROWS, length: int = LENGTH) -> Tensor:
    return torch.randint(4, VOCABULARY, (rows, length))


def _tokens(model: Any) -> Batch:
    ids = _ids()
    return {"input_ids": ids, "labels": ids}


def _classes(model: Any) -> Batch:
    return {"input_ids": _ids(4), "labels": torch.tensor([0, 1, 1, 0])}


def _translation(model: Any) -> Batch:
    return {"input_ids": _ids(), "labels": _ids()}


def _features(model: Any) -> Batch:
    """A spectrogram, and what was said."""
    config = model.config
    return {"input_features": torch.randn(ROWS, config.num_mel_bins, 2 * config.max_source_positions), "labels": _ids()}


def _wave(model: Any) -> Batch:
    return {"input_values": torch.randn(ROWS, 1000), "labels": torch.randint(4, 32, (ROWS, 4))}


def _sounds(model: Any) -> Batch:
    return {
        "input_values": torch.randn(4, model.config.max_length, model.config.num_mel_bins),
        "labels": torch.tensor([0, 1, 1, 0]),
    }


def _images(model: Any) -> Batch:
    config = model.config
    size = getattr(config, "image_size", None) or 32
    images = torch.randn(8, config.num_channels, size, size)
    return {"pixel_values": images, "labels": torch.arange(8) % 2}


def _unlabelled_images(model: Any) -> Batch:
    return {key: value for key, value in _images(model).items() if key == "pixel_values"}


def _segments(model: Any) -> Batch:
    return {"pixel_values": torch.randn(ROWS, 3, 32, 32), "labels": torch.randint(2, (ROWS, 32, 32))}


def _pairs(model: Any) -> Batch:
    size = model.config.vision_config.image_size
    return {"input_ids": _ids(4), "pixel_values": torch.randn(4, 3, size, size), "return_loss": True}


def _captions(model: Any) -> Batch:
    ids = _ids()
    return {"input_ids": ids, "pixel_values": torch.randn(ROWS, 3, 16, 16), "labels": ids}


IMAGE_TOKEN = 3


def _seen(number: int, pixels: tuple[int, ...], **more: Tensor) -> Callable[[Any], Batch]:
    """Text with so many tokens of an image in it."""

    def batch(model: Any) -> Batch:
        ids = _ids()
        ids[:, 1 : 1 + number] = IMAGE_TOKEN
        labels = ids.masked_fill(ids == IMAGE_TOKEN, -100)
        return {"input_ids": ids, "labels": labels, "pixel_values": torch.randn(pixels), **more}

    return batch


# ---- models of transformers


def made(cls: str, settings: Mapping[str, Any]) -> nn.Module:
    """A model of transformers, by the name of its class, with these settings."""
    import transformers

    model: Any = getattr(transformers, cls)
    return model(model.config_class(**settings))  # type: ignore[no-any-return]


def _hub(
    name: str,
    group: str,
    cls: str,
    size: str,
    batch: Callable[[Any], Batch],
    tiny: Mapping[str, Any],
    real: Mapping[str, Any] | None = None,
) -> Architecture:
    return Architecture(name, group, size, lambda: made(cls, tiny), batch, lambda: made(cls, real or {}))


# Names that configurations have in common; those of one that calls them otherwise know these too.
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT = {key: value for key, value in TEXT.items() if key not in ("num_key_value_heads", "head_dim")}
MOE = {
    **TEXT,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 2 * HIDDEN,
    "shared_expert_intermediate_size": HIDDEN,
}


def _decoder(name: str, cls: str, size: str, real: Mapping[str, Any] | None = None, **own: Any) -> Architecture:
    return _hub(name, "decoders", cls, size, _tokens, {**TEXT, **own}, real)


def _moe(name: str, cls: str, size: str, real: Mapping[str, Any] | None = None, **own: Any) -> Architecture:
    return _hub(name, "mixtures of experts", cls, size, _tokens, {**MOE, **own}, real)


DECODERS = (
    _decoder("llama", "LlamaForCausalLM", "Llama 2 7B"),
    _decoder("mistral", "MistralForCausalLM", "Mistral 7B"),
    _decoder(
        "qwen2",
        "Qwen2ForCausalLM",
        "Qwen2.5 7B",
        {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
        },
    ),
    _decoder(
        "qwen3",
        "Qwen3ForCausalLM",
        "Qwen3 8B",
        {"intermediate_size": 12288, "num_hidden_layers": 36, "num_key_value_heads": 8},
    ),
    _decoder("gemma2", "Gemma2ForCausalLM", "Gemma 2 2B", query_pre_attn_scalar=8),
    _decoder(
        "gemma3_text",
        "Gemma3ForCausalLM",
        "Gemma 3 1B",
        {
            "hidden_size": 1152,
            "intermediate_size": 6912,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "vocab_size": 262144,
        },
        query_pre_attn_scalar=8,
    ),
    _decoder("phi3", "Phi3ForCausalLM", "Phi-3 mini"),
    _decoder("gpt2", "GPT2LMHeadModel", "GPT-2", resid_pdrop=0.0),
    _decoder("gpt_neox", "GPTNeoXForCausalLM", "GPT-NeoX 20B"),
    _hub("opt", "decoders", "OPTForCausalLM", "OPT 125M", _tokens, {**GPT, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    _hub(
        "bloom",
        "decoders",
        "BloomForCausalLM",
        "BLOOM 560M",
        _tokens,
        GPT,
        {"vocab_size": 250880, "hidden_size": 1024, "n_layer": 24, "n_head": 16},
    ),
    _hub("falcon", "decoders", "FalconForCausalLM", "Falcon 7B", _tokens, GPT),
    _decoder("olmo2", "Olmo2ForCausalLM", "OLMo 2 7B", {"vocab_size": 100352}),
    _decoder("starcoder2", "Starcoder2ForCausalLM", "StarCoder2 3B"),
    _decoder("stablelm", "StableLmForCausalLM", "StableLM 3B"),
    _decoder("glm4", "Glm4ForCausalLM", "GLM-4 9B"),
    _decoder("smollm3", "SmolLM3ForCausalLM", "SmolLM3 3B"),
    _decoder(
        "granite",
        "GraniteForCausalLM",
        "Granite 3.1 8B",
        {
            "vocab_size": 49155,
            "intermediate_size": 12800,
            "num_hidden_layers": 40,
            "num_key_value_heads": 8,
            "tie_word_embeddings": True,
        },
    ),
    _decoder("cohere", "CohereForCausalLM", "Command R", logit_scale=1.0),
)

MIXTURES = (
    _moe("mixtral", "MixtralForCausalLM", "Mixtral 8x7B"),
    _moe("qwen2_moe", "Qwen2MoeForCausalLM", "Qwen1.5 MoE A2.7B"),
    _moe(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        "Qwen3 30B A3B",
        {"num_hidden_layers": 48, "head_dim": 128},
    ),
    _moe(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        "DeepSeek-V3",
        num_key_value_heads=4,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        head_dim=4,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
    ),
    _moe("gpt_oss", "GptOssForCausalLM", "gpt-oss 120B"),
    _moe("olmoe", "OlmoeForCausalLM", "OLMoE 1B-7B", {"intermediate_size": 1024}),
    _moe(
        "granitemoe",
        "GraniteMoeForCausalLM",
        "Granite 3.0 3B A800M",
        {
            "vocab_size": 49155,
            "hidden_size": 1536,
            "intermediate_size": 512,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "num_local_experts": 40,
            "num_experts_per_tok": 8,
            "tie_word_embeddings": True,
        },
    ),
    _moe("phimoe", "PhimoeForCausalLM", "Phi-3.5 MoE"),
    _moe("llama4_text", "Llama4ForCausalLM", "Llama 4 Scout, text", intermediate_size_mlp=2 * HIDDEN),
    _moe(
        "dbrx",
        "DbrxForCausalLM",
        "DBRX",
        {
            "d_model": 6144,
            "n_heads": 48,
            "n_layers": 40,
            "vocab_size": 100352,
            "attn_config": {"kv_n_heads": 8, "rope_theta": 5e5, "clip_qkv": 8},
            "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
        },
        d_model=HIDDEN,
        n_heads=4,
        n_layers=2,
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        # As wide as the model: older releases of transformers take the one for the other in routers.
        ffn_config={"ffn_hidden_size": HIDDEN, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": HIDDEN},
    ),
    _moe(
        "jetmoe",
        "JetMoeForCausalLM",
        "JetMoE 8B",
        {"num_hidden_layers": 24},
        kv_channels=8,
        num_key_value_heads=2,
        num_attention_heads=4,
    ),
    _moe(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        "GLM-4.5 Air",
        {"head_dim": 128},
        n_routed_experts=4,
        first_k_dense_replace=1,
    ),
)

STATE_SPACES = (
    _hub(
        "mamba",
        "state spaces and hybrids",
        "MambaForCausalLM",
        "Mamba 130M",
        _tokens,
        {**GPT, "state_size": 8, "time_step_rank": 8, "use_mambapy": False},
        {"num_hidden_layers": 24},
    ),
    _hub(
        "mamba2",
        "state spaces and hybrids",
        "Mamba2ForCausalLM",
        "Mamba-Codestral 7B",
        _tokens,
        {**GPT, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 4},
    ),
    _hub(
        "falcon_mamba",
        "state spaces and hybrids",
        "FalconMambaForCausalLM",
        "Falcon Mamba 7B",
        _tokens,
        {**GPT, "state_size": 8, "time_step_rank": 8},
        {"hidden_size": 4096, "num_hidden_layers": 64, "vocab_size": 65024, "tie_word_embeddings": False},
    ),
    _hub(
        "recurrent_gemma",
        "state spaces and hybrids",
        "RecurrentGemmaForCausalLM",
        "RecurrentGemma 2B",
        _tokens,
        {**TEXT, "lru_width": HIDDEN, "num_hidden_layers": 3, "attention_window_size": 8},
        {"intermediate_size": 15360, "num_key_value_heads": 1},
    ),
    _hub(
        "rwkv",
        "state spaces and hybrids",
        "RwkvForCausalLM",
        "RWKV-4 169M",
        _tokens,
        {**GPT, "attention_hidden_size": HIDDEN},
        {"hidden_size": 768, "num_hidden_layers": 12, "vocab_size": 50277},
    ),
    _hub(
        "jamba",
        "state spaces and hybrids",
        "JambaForCausalLM",
        "Jamba v0.1",
        _tokens,
        {
            **MOE,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 8,
            "use_mamba_kernels": False,
        },
    ),
    _hub(
        "lfm2",
        "state spaces and hybrids",
        "Lfm2ForCausalLM",
        "LFM2 1.2B",
        _tokens,
        {**TEXT, "layer_types": ["conv", "full_attention"], "block_multiple_of": 16},
        {
            "hidden_size": 2048,
            "num_hidden_layers": 16,
            "full_attn_idxs": [2, 5, 8, 10, 12, 14],
        },
    ),
    _hub(
        "qwen3_next",
        "state spaces and hybrids",
        "Qwen3NextForCausalLM",
        "Qwen3-Next 80B A3B",
        _tokens,
        {
            **MOE,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
    ),
)


def _encoder(
    name: str, cls: str, size: str, batch: Callable[[Any], Batch], real: Mapping[str, Any] | None = None, **own: Any
) -> Architecture:
    return _hub(name, "encoders", cls, size, batch, {**GPT, **own}, real)


ENCODERS = (
    _encoder("bert", "BertForMaskedLM", "BERT base", _tokens),
    _encoder("roberta", "RobertaForMaskedLM", "RoBERTa base", _tokens),
    _encoder(
        "xlm-roberta",
        "XLMRobertaForSequenceClassification",
        "XLM-RoBERTa base",
        _classes,
        {"vocab_size": 250002, "max_position_embeddings": 514, "type_vocab_size": 1},
    ),
    _encoder(
        "deberta-v2",
        "DebertaV2ForSequenceClassification",
        "DeBERTa v3 base",
        _classes,
        {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "relative_attention": True,
            "position_buckets": 256,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"],
            "type_vocab_size": 0,
            "max_relative_positions": -1,
            "position_biased_input": False,
        },
        relative_attention=True,
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
    ),
    _encoder("electra", "ElectraForSequenceClassification", "ELECTRA small", _classes, embedding_size=16),
    _encoder("distilbert", "DistilBertForSequenceClassification", "DistilBERT", _classes, hidden_dim=64),
    _encoder("modernbert", "ModernBertForMaskedLM", "ModernBERT base", _tokens),
    _encoder("albert", "AlbertForMaskedLM", "ALBERT xxlarge", _tokens, embedding_size=16),
    _encoder("mpnet", "MPNetForMaskedLM", "MPNet base", _tokens),
    _encoder(
        "esm",
        "EsmForMaskedLM",
        "ESM-2 650M",
        _tokens,
        {
            "vocab_size": 33,
            "hidden_size": 1280,
            "num_hidden_layers": 33,
            "num_attention_heads": 20,
            "intermediate_size": 5120,
            "position_embedding_type": "rotary",
            "pad_token_id": 1,
            "mask_token_id": 32,
        },
        position_embedding_type="rotary",
        mask_token_id=3,
    ),
)

SEQ2SEQ: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": HIDDEN,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 2 * HIDDEN,
    "decoder_ffn_dim": 2 * HIDDEN,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}
T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": HIDDEN,
    "d_kv": 8,
    "d_ff": 2 * HIDDEN,
    "num_layers": 1,
    "num_decoder_layers": 1,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}


def _translator(
    name: str, cls: str, size: str, tiny: Mapping[str, Any], real: Mapping[str, Any] | None = None
) -> Architecture:
    return _hub(name, "encoder-decoders", cls, size, _translation, tiny, real)


TRANSLATORS = (
    _translator("t5", "T5ForConditionalGeneration", "T5 small", T5),
    _translator(
        "mt5",
        "MT5ForConditionalGeneration",
        "mT5 small",
        {**T5, "feed_forward_proj": "gated-gelu", "initializer_factor": 0.1},
    ),
    _translator("bart", "BartForConditionalGeneration", "BART large", SEQ2SEQ),
    _translator(
        "mbart",
        "MBartForConditionalGeneration",
        "mBART large",
        SEQ2SEQ,
        {"vocab_size": 250027},
    ),
    _translator(
        "pegasus",
        "PegasusForConditionalGeneration",
        "PEGASUS large",
        SEQ2SEQ,
        {"vocab_size": 96103, "encoder_layers": 16, "decoder_layers": 16},
    ),
    _translator("m2m_100", "M2M100ForConditionalGeneration", "M2M100 418M", SEQ2SEQ),
)

WAVES: dict[str, Any] = {
    **GPT,
    "vocab_size": 40,
    "conv_dim": (32, 32),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "apply_spec_augment": False,
    "layerdrop": 0.0,
}
SPEECH = (
    _hub(
        "whisper",
        "speech",
        "WhisperForConditionalGeneration",
        "Whisper tiny",
        _features,
        {**SEQ2SEQ, "num_mel_bins": 20, "max_source_positions": 16, "max_target_positions": 16},
    ),
    _hub("wav2vec2", "speech", "Wav2Vec2ForCTC", "wav2vec 2.0 base", _wave, WAVES),
    _hub("hubert", "speech", "HubertForCTC", "HuBERT base", _wave, WAVES),
    _hub(
        "wavlm", "speech", "WavLMForCTC", "WavLM base", _wave, {**WAVES, "num_buckets": 16, "max_bucket_distance": 20}
    ),
    _hub(
        "audio-spectrogram-transformer",
        "speech",
        "ASTForAudioClassification",
        "AST",
        _sounds,
        {**GPT, "max_length": 32, "num_mel_bins": 16, "patch_size": 8, "frequency_stride": 8, "time_stride": 8},
    ),
)

VISION_TRANSFORMER: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
    "num_channels": 3,
}
VISION = (
    _hub("vit", "vision", "ViTForImageClassification", "ViT base", _images, VISION_TRANSFORMER),
    _hub("deit", "vision", "DeiTForImageClassification", "DeiT base", _images, VISION_TRANSFORMER),
    _hub("beit", "vision", "BeitForImageClassification", "BEiT base", _images, VISION_TRANSFORMER),
    _hub("dinov2", "vision", "Dinov2ForImageClassification", "DINOv2 base", _images, VISION_TRANSFORMER),
    _hub(
        "vit_mae",
        "vision",
        "ViTMAEForPreTraining",
        "ViT-MAE base",
        _unlabelled_images,
        {
            **VISION_TRANSFORMER,
            "decoder_hidden_size": HIDDEN,
            "decoder_intermediate_size": 2 * HIDDEN,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 4,
        },
    ),
    _hub(
        "swin",
        "vision",
        "SwinForImageClassification",
        "Swin tiny",
        _images,
        {
            "image_size": 32,
            "patch_size": 4,
            "embed_dim": 16,
            "depths": [1, 1],
            "num_heads": [2, 4],
            "window_size": 4,
            "drop_path_rate": 0.0,
        },
    ),
    _hub(
        "convnext",
        "vision",
        "ConvNextForImageClassification",
        "ConvNeXt tiny",
        _images,
        {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "image_size": 32},
    ),
    _hub(
        "resnet",
        "vision",
        "ResNetForImageClassification",
        "ResNet-50",
        _images,
        {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 1], "layer_type": "bottleneck"},
    ),
    _hub(
        "mobilenet_v2",
        "vision",
        "MobileNetV2ForImageClassification",
        "MobileNetV2 1.0",
        _images,
        {"image_size": 32, "depth_multiplier": 0.25, "depth_divisible_by": 8, "min_depth": 8},
    ),
    _hub(
        "segformer",
        "vision",
        "SegformerForSemanticSegmentation",
        "SegFormer B0",
        _segments,
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [16, 32],
            "patch_sizes": [3, 3],
            "strides": [2, 2],
            "num_attention_heads": [2, 4],
            "mlp_ratios": [2, 2],
            "decoder_hidden_size": HIDDEN,
            "drop_path_rate": 0.0,
        },
    ),
)

SEES = {"text_config": {**TEXT, "model_type": "llama"}, "image_token_id": IMAGE_TOKEN}
VISION_LANGUAGE = (
    _hub(
        "clip",
        "vision and language",
        "CLIPModel",
        "CLIP ViT-B/32",
        _pairs,
        {"text_config": GPT, "vision_config": VISION_TRANSFORMER, "projection_dim": HIDDEN},
    ),
    _hub(
        "siglip",
        "vision and language",
        "SiglipModel",
        "SigLIP base",
        _pairs,
        {"text_config": {**GPT, "projection_size": HIDDEN}, "vision_config": VISION_TRANSFORMER},
    ),
    _hub(
        "blip",
        "vision and language",
        "BlipForConditionalGeneration",
        "BLIP base",
        _captions,
        {
            "text_config": {**GPT, "encoder_hidden_size": HIDDEN, "sep_token_id": 2},
            "vision_config": VISION_TRANSFORMER,
            "projection_dim": HIDDEN,
            "image_text_hidden_size": HIDDEN,
        },
    ),
    _hub(
        "llava",
        "vision and language",
        "LlavaForConditionalGeneration",
        "LLaVA 1.5 7B",
        _seen(4, (ROWS, 3, 16, 16)),
        {
            **SEES,
            "vision_config": {**VISION_TRANSFORMER, "model_type": "clip_vision_model", "patch_size": 8},
            "vision_feature_layer": -1,
        },
    ),
    _hub(
        "qwen2_vl",
        "vision and language",
        "Qwen2VLForConditionalGeneration",
        "Qwen2-VL 72B",
        _seen(
            4,
            (ROWS * 16, 3 * 2 * 4 * 4),
            image_grid_thw=torch.tensor([[1, 4, 4]] * ROWS),
            mm_token_type_ids=torch.tensor([[0, 1, 1, 1, 1, *[0] * (LENGTH - 5)]] * ROWS),
        ),
        {
            "text_config": {
                **TEXT,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
            },
            "vision_config": {
                "depth": 2,
                "embed_dim": HIDDEN,
                "hidden_size": HIDDEN,
                "num_heads": 4,
                "mlp_ratio": 2,
                "patch_size": 4,
                "temporal_patch_size": 2,
            },
            "image_token_id": IMAGE_TOKEN,
            "video_token_id": 0,
            "vision_start_token_id": 1,
            "vision_end_token_id": 2,
        },
    ),
    _hub(
        "idefics3",
        "vision and language",
        "Idefics3ForConditionalGeneration",
        "Idefics3 8B",
        _seen(4, (ROWS, 1, 3, 16, 16)),
        {**SEES, "vision_config": VISION_TRANSFORMER, "scale_factor": 2},
        {
            "text_config": {
                "model_type": "llama",
                "vocab_size": 128259,
                "intermediate_size": 14336,
                "num_key_value_heads": 8,
            },
            "vision_config": {
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_hidden_layers": 27,
                "num_attention_heads": 16,
                "patch_size": 14,
                "image_size": 364,
            },
        },
    ),
    _hub(
        "paligemma",
        "vision and language",
        "PaliGemmaForConditionalGeneration",
        "PaliGemma 3B",
        _seen(4, (ROWS, 3, 16, 16), token_type_ids=torch.ones(ROWS, LENGTH, dtype=torch.long)),
        {
            "text_config": {**TEXT, "model_type": "gemma"},
            "vision_config": {
                **VISION_TRANSFORMER,
                "model_type": "siglip_vision_model",
                "patch_size": 8,
                "vision_use_head": False,
            },
            "image_token_id": IMAGE_TOKEN,
            "projection_dim": HIDDEN,
        },
    ),
)


# ---- models of torch and diffusers


class LanguageModel(nn.Module):
    """A language model around any layer that goes from hidden states to hidden states."""

    def __init__(self, vocabulary: int, hidden: int, inside: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.inside = inside
        self.head = nn.Linear(hidden, vocabulary)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, labels: Tensor) -> types.SimpleNamespace:
        hidden = self.inside(self.embedding(input_ids))
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        loss = nn.functional.cross_entropy(self.head(hidden)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return types.SimpleNamespace(loss=loss)


def _recurrent(cls: type[nn.LSTM | nn.GRU]) -> Architecture:
    def make(vocabulary: int, hidden: int, layers: int) -> nn.Module:
        return LanguageModel(vocabulary, hidden, cls(hidden, hidden, layers, batch_first=True))

    return Architecture(
        f"torch.nn.{cls.__name__}",
        "recurrent, and others of torch",
        "2 layers of 1500, Penn Treebank",
        lambda: make(VOCABULARY, HIDDEN, 2),
        _tokens,
        lambda: make(10_000, 1500, 2),
    )


def _torch_encoder(hidden: int, heads: int, wide: int, layers: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(hidden, heads, wide, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


class Denoiser(nn.Module):
    """A model of diffusers with its loss, which its pipelines' training scripts compute themselves."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, target: Tensor, **inputs: Tensor) -> types.SimpleNamespace:
        return types.SimpleNamespace(loss=nn.functional.mse_loss(self.inside(**inputs).sample, target))


def _denoiser(
    cls: str, size: str, tiny: Mapping[str, Any], inputs: Callable[[], Batch], real: Mapping[str, Any] | None = None
) -> Architecture:
    def build(settings: Mapping[str, Any]) -> nn.Module:
        import diffusers

        return Denoiser(getattr(diffusers, cls)(**settings))

    return Architecture(
        f"diffusers.{cls}", DIFFUSION, size, lambda: build(tiny), lambda model: inputs(), lambda: build(real or {})
    )


def _noisy(channels: int, size: int, words: int) -> Batch:
    return {
        "hidden_states": torch.randn(ROWS, channels, size, size),
        "timestep": torch.tensor([10, 500]),
        "encoder_hidden_states": torch.randn(ROWS, 5, words),
        "target": torch.randn(ROWS, channels, size, size),
    }


def _noisy_for_unet() -> Batch:
    batch = dict(_noisy(4, 8, 32))
    return {"sample": batch.pop("hidden_states"), **batch}


DIFFUSION = "diffusion"
DENOISERS = (
    _denoiser(
        "UNet2DConditionModel",
        "Stable Diffusion 1.5",
        {
            "sample_size": 8,
            "layers_per_block": 1,
            "block_out_channels": (16, 32),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 32,
            "attention_head_dim": 4,
            "norm_num_groups": 4,
        },
        _noisy_for_unet,
        {"sample_size": 64, "cross_attention_dim": 768},
    ),
    _denoiser(
        "SD3Transformer2DModel",
        "Stable Diffusion 3.5 medium",
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "joint_attention_dim": 32,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 32,
            "pos_embed_max_size": 8,
            "qk_norm": "rms_norm",
        },
        lambda: {**_noisy(4, 8, 32), "pooled_projections": torch.randn(ROWS, 32)},
        {
            "sample_size": 128,
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "qk_norm": "rms_norm",
            "dual_attention_layers": tuple(range(13)),
        },
    ),
)

OTHERS = (
    _recurrent(nn.LSTM),
    _recurrent(nn.GRU),
    Architecture(
        "torch.nn.TransformerEncoder",
        "recurrent, and others of torch",
        "6 layers of 512",
        lambda: LanguageModel(VOCABULARY, HIDDEN, _torch_encoder(HIDDEN, 4, 2 * HIDDEN, 2)),
        _tokens,
        lambda: LanguageModel(37_000, 512, _torch_encoder(512, 8, 2048, 6)),
    ),
)

ZOO: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        *DECODERS,
        *MIXTURES,
        *STATE_SPACES,
        *ENCODERS,
        *TRANSLATORS,
        *SPEECH,
        *VISION,
        *VISION_LANGUAGE,
        *DENOISERS,
        *OTHERS,
    )
}
"""Every architecture by its name, in the order of the table."""
