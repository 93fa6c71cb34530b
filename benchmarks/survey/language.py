"""Text, speech, text with images, and diffusion: transformers, open_clip and diffusers with small configurations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from survey.model import SurveyModel, diffusers_model, image, open_clip_model, tokens, transformers_model


def transformers_models() -> list[SurveyModel]:
    def text(**more: Any) -> Callable[[], dict]:
        return lambda: {"input_ids": tokens(), **{name: make() for name, make in more.items()}}

    def pixels(size: int = 32) -> Callable[[], dict]:
        return lambda: {"pixel_values": image(size)[0]}

    def audio(length: int = 2000) -> Callable[[], dict]:
        return lambda: {"input_values": torch.randn(2, length)}

    encoder = {"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
               "intermediate_size": 128, "max_position_embeddings": 32}  # fmt: skip
    decoder = encoder | {"num_key_value_heads": 2, "use_cache": False, "pad_token_id": 0, "bos_token_id": 1,
                         "eos_token_id": 2}  # fmt: skip
    vision = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
              "image_size": 32, "patch_size": 8}  # fmt: skip
    seq2seq = {"vocab_size": 100, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 128,
               "decoder_ffn_dim": 128, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "use_cache": False,
               "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}  # fmt: skip
    wav = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
           "conv_dim": (32, 32), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2,
           "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "vocab_size": 32,
           "mask_time_prob": 0.0, "mask_feature_prob": 0.0, "apply_spec_augment": False, "layerdrop": 0.0}  # fmt: skip
    clip = {"text_config": encoder | {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1},
            "vision_config": vision, "projection_dim": 48}  # fmt: skip
    backbone = {"embedding_size": 32, "hidden_sizes": [32, 64, 96], "depths": [1, 2, 1], "num_labels": 5}
    pyramid = {"embed_dim": 24, "depths": [1, 2, 1], "num_heads": [2, 4, 8], "image_size": 32, "patch_size": 2,
               "window_size": 4, "num_labels": 5}  # fmt: skip
    specs: list[tuple[str, str, str, str, Callable[[], dict], dict[str, Any]]] = [
        ("bert", "transformer", "BertForSequenceClassification", "BertConfig", text(), encoder),
        ("bert-mlm", "transformer", "BertForMaskedLM", "BertConfig", text(), encoder),
        ("roberta", "transformer", "RobertaForSequenceClassification", "RobertaConfig", text(), encoder),
        ("distilbert", "transformer", "DistilBertForSequenceClassification", "DistilBertConfig", text(),
         {"vocab_size": 100, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128}),
        ("albert", "transformer", "AlbertForSequenceClassification", "AlbertConfig", text(),
         encoder | {"embedding_size": 32}),
        ("electra", "transformer", "ElectraForSequenceClassification", "ElectraConfig", text(),
         encoder | {"embedding_size": 32}),
        ("deberta-v2", "transformer", "DebertaV2ForSequenceClassification", "DebertaV2Config", text(),
         encoder | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}),
        ("mpnet", "transformer", "MPNetModel", "MPNetConfig", text(), encoder),
        ("funnel", "transformer", "FunnelBaseModel", "FunnelConfig", text(),
         {"vocab_size": 100, "d_model": 64, "n_head": 4, "d_head": 16, "d_inner": 128, "block_sizes": [1, 1]}),
        ("gpt2", "transformer", "GPT2LMHeadModel", "GPT2Config", text(),
         {"vocab_size": 100, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32, "use_cache": False,
          "bos_token_id": 1, "eos_token_id": 2}),
        ("opt", "transformer", "OPTForCausalLM", "OPTConfig", text(),
         {"vocab_size": 100, "hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
          "max_position_embeddings": 32, "word_embed_proj_dim": 64, "use_cache": False, "pad_token_id": 0}),
        ("bloom", "transformer", "BloomForCausalLM", "BloomConfig", text(),
         {"vocab_size": 100, "hidden_size": 64, "n_layer": 2, "n_head": 4, "use_cache": False}),
        ("gpt-neox", "transformer", "GPTNeoXForCausalLM", "GPTNeoXConfig", text(), encoder | {"use_cache": False}),
        ("llama", "transformer", "LlamaForCausalLM", "LlamaConfig", text(), decoder),
        ("mistral", "transformer", "MistralForCausalLM", "MistralConfig", text(), decoder),
        ("qwen2", "transformer", "Qwen2ForCausalLM", "Qwen2Config", text(), decoder),
        ("qwen3", "transformer", "Qwen3ForCausalLM", "Qwen3Config", text(), decoder | {"head_dim": 16}),
        ("gemma", "transformer", "GemmaForCausalLM", "GemmaConfig", text(), decoder | {"head_dim": 16}),
        ("phi", "transformer", "PhiForCausalLM", "PhiConfig", text(), decoder),
        ("mixtral", "transformer", "MixtralForCausalLM", "MixtralConfig", text(),
         decoder | {"num_local_experts": 4, "num_experts_per_tok": 2}),
        ("mamba", "hybrid", "MambaForCausalLM", "MambaConfig", text(),
         {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "use_cache": False}),
        ("t5", "transformer", "T5ForConditionalGeneration", "T5Config", text(decoder_input_ids=tokens),
         {"vocab_size": 100, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4,
          "use_cache": False}),
        ("bart", "transformer", "BartForConditionalGeneration", "BartConfig", text(decoder_input_ids=tokens),
         seq2seq | {"max_position_embeddings": 32}),
        ("vit", "transformer", "ViTForImageClassification", "ViTConfig", pixels(), vision),
        ("deit", "transformer", "DeiTForImageClassification", "DeiTConfig", pixels(), vision),
        ("dinov2", "transformer", "Dinov2ForImageClassification", "Dinov2Config", pixels(), vision | {"mlp_ratio": 2}),
        ("swin", "transformer", "SwinForImageClassification", "SwinConfig", pixels(), pyramid),
        ("segformer", "hybrid", "SegformerForSemanticSegmentation", "SegformerConfig", pixels(64),
         {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [4, 2], "hidden_sizes": [32, 64],
          "patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [2, 4], "mlp_ratios": [2, 2],
          "decoder_hidden_size": 32, "num_labels": 5}),
        ("convnext", "cnn", "ConvNextForImageClassification", "ConvNextConfig", pixels(64),
         {"hidden_sizes": [16, 32, 64, 96], "depths": [1, 1, 2, 1], "num_labels": 5}),
        ("resnet", "cnn", "ResNetForImageClassification", "ResNetConfig", pixels(64),
         backbone | {"layer_type": "bottleneck"}),
        ("regnet", "cnn", "RegNetForImageClassification", "RegNetConfig", pixels(64), backbone | {"groups_width": 16}),
        ("mobilevit", "hybrid", "MobileViTForImageClassification", "MobileViTConfig", pixels(64),
         {"hidden_sizes": [48, 64, 80], "neck_hidden_sizes": [16, 16, 24, 48, 64, 80, 160], "num_labels": 5}),
        ("poolformer", "hybrid", "PoolFormerForImageClassification", "PoolFormerConfig", pixels(64),
         {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1], "num_labels": 5}),
        ("wav2vec2", "hybrid", "Wav2Vec2ForCTC", "Wav2Vec2Config", audio(), wav),
        ("hubert", "hybrid", "HubertModel", "HubertConfig", audio(), wav),
        ("whisper", "hybrid", "WhisperForConditionalGeneration", "WhisperConfig",
         lambda: {"input_features": torch.randn(2, 16, 64), "decoder_input_ids": tokens()},
         seq2seq | {"num_mel_bins": 16, "max_source_positions": 32, "max_target_positions": 32}),
        ("clip", "transformer", "CLIPModel", "CLIPConfig", text(pixel_values=lambda: image(32)[0]), clip),
        ("siglip", "transformer", "SiglipModel", "SiglipConfig", text(pixel_values=lambda: image(32)[0]),
         {name: clip[name] for name in ("text_config", "vision_config")}),
        ("detr", "hybrid", "DetrForObjectDetection", "DetrConfig", pixels(64),
         seq2seq | {"use_timm_backbone": True, "backbone": "resnet18", "use_pretrained_backbone": False,
                    "num_queries": 5}),
    ]  # fmt: skip
    return [SurveyModel("transformers", name, kind, partial(transformers_model, cls, config, inputs, **options))
            for name, kind, cls, config, inputs, options in specs]  # fmt: skip


def open_clip_models() -> list[SurveyModel]:
    text = {"context_length": 16, "vocab_size": 100, "width": 64, "heads": 4, "layers": 2}
    vit = {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 16, "layers": 2}
    resnet = {"image_size": 32, "layers": (1, 1, 1, 1), "width": 16, "head_width": 16}
    return [SurveyModel("open_clip", "clip-vit", "transformer", partial(open_clip_model, text, vit)),
            SurveyModel("open_clip", "clip-resnet", "hybrid", partial(open_clip_model, text, resnet))]  # fmt: skip


def diffusers_models() -> list[SurveyModel]:
    def noisy(size: int = 16, channels: int = 3, **more: Callable[[], torch.Tensor]) -> Callable[[], dict]:
        return lambda: {"sample": image(size, channels)[0], "timestep": torch.tensor([3, 7]),
                        **{name: make() for name, make in more.items()}}  # fmt: skip

    blocks = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
    unet = blocks | {"sample_size": 16, "in_channels": 3, "out_channels": 3}
    vae = {"in_channels": 3, "out_channels": 3, "latent_channels": 4,
           "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}  # fmt: skip
    specs: list[tuple[str, str, Callable[[], dict], dict[str, Any]]] = [
        ("UNet2DModel", "hybrid", noisy(), unet | {
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}),
        ("UNet2DConditionModel", "hybrid", noisy(encoder_hidden_states=lambda: torch.randn(2, 6, 32)), unet | {
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": 32,
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 8}),
        ("AutoencoderKL", "hybrid", lambda: {"sample": image(32)[0]}, blocks | vae),
        ("VQModel", "hybrid", lambda: {"sample": image(32)[0]}, blocks | vae | {"num_vq_embeddings": 16}),
        ("DiTTransformer2DModel", "transformer",
         lambda: {"hidden_states": image(16, 4)[0], "timestep": torch.tensor([3, 7]),
                  "class_labels": torch.tensor([1, 2])},
         {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2, "sample_size": 16, "in_channels": 4,
          "out_channels": 4, "patch_size": 2, "norm_num_groups": 8}),
    ]  # fmt: skip
    return [SurveyModel("diffusers", cls, kind, partial(diffusers_model, cls, inputs, **options))
            for cls, kind, inputs, options in specs]  # fmt: skip
