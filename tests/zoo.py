"""Real architectures, built from configurations with random weights: tiny, and nothing is downloaded.

A :class:`Specimen` is one of them with a batch and the loss that its users write. ``TRANSFORMERS`` needs
the package of that name; ``TIMM`` also needs torchvision, whose wheels follow the newest torch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

Inputs = dict[str, Any]
Settings = Mapping[str, Any]

BATCH, LENGTH, VOCAB, CLASSES, SIZE = 3, 7, 61, 5, 32


@dataclass(frozen=True)
class Specimen:
    """A model with a batch.

    Attributes:
        name: the class, or timm's name.
        make: a fresh model in float32.
        inputs: keyword arguments of the model.
        terms: ``n``, the terms that the loss averages over: rows of the layer nearest the loss.
        loss: of the model's output.
        dtype: that of parameters and inputs; float32 where an operator of the model knows no other.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Inputs
    terms: int
    loss: Callable[[Any], Tensor] = lambda output: output.loss
    dtype: torch.dtype = torch.float64

    def build(self) -> nn.Module:
        """The model in training mode, without dropout, the same in every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(11)
            model = self.make()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if hasattr(module, "drop_prob"):  # timm drops whole paths
                module.drop_prob = 0.0
        return model.to(self.dtype).train()

    def batch(self) -> Inputs:
        """The inputs, floating-point ones in the dtype of the model."""
        return {key: _to(value, self.dtype) for key, value in self.inputs.items()}

    def run(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """The loss of a model."""
        return self.loss(model(**inputs))

    def loss_fn(self, model: nn.Module) -> Callable[..., Tensor]:
        """``loss_fn(params, inputs)`` for the functional door."""

        def loss_fn(params: Mapping[str, Tensor], inputs: Inputs) -> Tensor:
            return self.loss(functional_call(model, dict(params), (), inputs))

        return loss_fn


def _to(value: Any, dtype: torch.dtype) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if floating else value


# --- batches -------------------------------------------------------------------------------------


def ids(*shape: int, below: int = VOCAB) -> Tensor:
    """Random integers; 0, 1 and 2, which stand for padding, start and end, are among them."""
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def text() -> Inputs:
    words = ids(BATCH, LENGTH)
    return {"input_ids": words, "attention_mask": torch.ones_like(words), "labels": words}


def translation() -> Inputs:
    return text() | {"labels": ids(BATCH, LENGTH - 2)}


def picture(size: int = SIZE) -> Inputs:
    return {"pixel_values": noise(BATCH, 3, size, size), "labels": ids(BATCH, below=CLASSES)}


def speech() -> Inputs:
    return {"input_features": noise(BATCH, 8, 24), "labels": ids(BATCH, LENGTH)}


def wave() -> Inputs:
    return {"input_values": noise(BATCH, 400)}


def caption() -> Inputs:
    words = {"input_ids": ids(BATCH, LENGTH), "attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.long)}
    return words | {"pixel_values": noise(BATCH, 3, SIZE, SIZE), "return_loss": True}


# --- transformers --------------------------------------------------------------------------------

TEXT: Settings = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DECODER: Settings = TEXT | {"num_key_value_heads": 2, "head_dim": 4}
IMAGE: Settings = {"num_labels": CLASSES, "image_size": SIZE, "problem_type": "single_label_classification"}
PATCHES: Settings = IMAGE | {
    "patch_size": 8,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SEQ2SEQ: Settings = {
    "vocab_size": VOCAB,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
TOKENS = BATCH * LENGTH


def transformer(cls: str, settings: Settings, inputs: Inputs, terms: int, **kwargs: Any) -> Specimen:
    """A model class of ``transformers``, configured by keywords."""

    def make() -> nn.Module:
        import transformers

        model_class = getattr(transformers, cls)
        config = model_class.config_class(**settings)
        for part in (config, *(getattr(config, name) for name in config.sub_configs)):
            _without_dropout(part)
        return model_class(config)

    return Specimen(cls, make, inputs, terms, **kwargs)


def _without_dropout(config: Any) -> None:
    """Switch off everything random: models call ``F.dropout`` with numbers of their configuration."""
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)


def language_model(cls: str, **settings: Any) -> Specimen:
    return transformer(cls, {**TEXT, **settings}, text(), TOKENS)


def decoder(cls: str, **settings: Any) -> Specimen:
    return transformer(cls, {**DECODER, **settings}, text(), TOKENS)


# torch 2.11 cannot trace how the cache of keys is made; training needs none
NO_CACHE = {"use_cache": False} if torch.__version__.startswith("2.11") else {}


def renamed(cls: str, **settings: Any) -> Specimen:
    """A language model whose configuration has words of its own."""
    return transformer(cls, {"vocab_size": VOCAB, **settings}, text(), TOKENS)


def mixture(cls: str, **settings: Any) -> Specimen:
    """A language model with experts: ``grouped_mm`` knows no float64."""
    settings = {**DECODER, "num_experts_per_tok": 2, "moe_intermediate_size": 12, **settings}
    return transformer(cls, settings, text(), TOKENS, dtype=torch.float32)


def seq2seq(cls: str, inputs: Inputs, **settings: Any) -> Specimen:
    return transformer(cls, {**SEQ2SEQ, **settings}, inputs, inputs["labels"].numel())


def classifier(cls: str, **settings: Any) -> Specimen:
    return transformer(cls, {**IMAGE, **settings}, picture(), BATCH)


def wav2vec2() -> Specimen:
    """As it is fine-tuned: a feature encoder that trains sets ``requires_grad``, which no graph can hold.

    Nor can it hold CTC, whose operator looks at data, so every frame has a label here.
    """
    settings = {
        "conv_dim": (8, 8, 12),
        "conv_stride": (5, 2, 2),
        "conv_kernel": (10, 3, 3),
        "num_feat_extract_layers": 3,
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
        "apply_spec_augment": False,
    }
    frames = BATCH * 19  # of the 400 samples, behind the convolutions
    targets = ids(frames)

    def loss(output: Any) -> Tensor:
        return F.cross_entropy(output.logits.flatten(0, 1), targets)

    specimen = transformer("Wav2Vec2ForCTC", {**TEXT, **settings}, wave(), frames, loss=loss)

    def make() -> nn.Module:
        model = specimen.make()
        model.freeze_feature_encoder()
        return model

    return replace(specimen, make=make)


TRANSFORMERS = [
    # encoders
    language_model("BertForMaskedLM"),
    language_model("RobertaForMaskedLM"),
    renamed("DistilBertForMaskedLM", dim=16, hidden_dim=20, n_layers=2, n_heads=4),
    language_model("AlbertForMaskedLM", embedding_size=12),
    language_model("ElectraForMaskedLM", embedding_size=12),
    language_model(
        "DebertaV2ForMaskedLM",
        relative_attention=True,
        pos_att_type="c2p|p2c",
        share_att_key=True,
        position_buckets=4,
        norm_rel_ebd="layer_norm",
    ),
    language_model("SqueezeBertForMaskedLM", embedding_size=16, q_groups=2, intermediate_groups=2),
    renamed("XLNetLMHeadModel", d_model=16, n_layer=2, n_head=4, d_inner=20),
    # decoders
    renamed("GPT2LMHeadModel", n_embd=16, n_layer=2, n_head=4, n_positions=24),
    renamed("GPTJForCausalLM", n_embd=16, n_layer=2, n_head=4, n_positions=24, rotary_dim=2),
    language_model("GPTNeoXForCausalLM"),
    language_model("OPTForCausalLM", ffn_dim=20, word_embed_proj_dim=12),
    renamed("BloomForCausalLM", hidden_size=16, n_layer=2, n_head=4),
    decoder("LlamaForCausalLM"),
    decoder("MistralForCausalLM", sliding_window=4),
    decoder("Qwen2ForCausalLM"),
    decoder("Qwen3ForCausalLM"),
    decoder("GemmaForCausalLM"),
    decoder("PhiForCausalLM"),
    decoder("Phi3ForCausalLM"),
    mixture("MixtralForCausalLM", num_local_experts=4),
    mixture("Qwen2MoeForCausalLM", num_experts=4, shared_expert_intermediate_size=12),
    mixture("GptOssForCausalLM", num_local_experts=4),
    mixture(
        "DeepseekV3ForCausalLM",
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=6,
        q_lora_rank=10,
        qk_rope_head_dim=2,
        qk_nope_head_dim=4,
        v_head_dim=4,
        num_key_value_heads=4,
        head_dim=2,
    ),
    renamed("MambaForCausalLM", hidden_size=16, num_hidden_layers=2, state_size=4, time_step_rank=3),
    # encoders with decoders
    renamed("T5ForConditionalGeneration", d_model=16, d_kv=4, d_ff=20, num_layers=2, num_heads=4,
            decoder_start_token_id=0, **NO_CACHE),
    seq2seq("BartForConditionalGeneration", translation(), max_position_embeddings=24),
    seq2seq("WhisperForConditionalGeneration", speech(), num_mel_bins=8, max_source_positions=12,
            max_target_positions=10, **NO_CACHE),
    # speech, pictures, both
    wav2vec2(),
    transformer(
        "CLIPModel", {"text_config": TEXT, "vision_config": PATCHES, "projection_dim": 8}, caption(), BATCH
    ),
    classifier("ViTForImageClassification", **PATCHES),
    classifier("DeiTForImageClassification", **PATCHES),
    classifier("Dinov2ForImageClassification", **PATCHES, use_swiglu_ffn=True),
    classifier("SwinForImageClassification", patch_size=4, embed_dim=8, depths=[2, 1], num_heads=[2, 4],
               window_size=4),
    classifier("SegformerForImageClassification", num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1],
               hidden_sizes=[8, 16], patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[2, 4],
               mlp_ratios=[2, 2], decoder_hidden_size=16),
    classifier("ConvNextForImageClassification", num_stages=2, hidden_sizes=[8, 12], depths=[1, 1]),
    classifier("ResNetForImageClassification", embedding_size=6, hidden_sizes=[8, 12], depths=[1, 2]),
    classifier("RegNetForImageClassification", embedding_size=6, hidden_sizes=[8, 12], depths=[1, 1],
               groups_width=4),
    classifier("EfficientNetForImageClassification", width_coefficient=0.05, depth_coefficient=1.0,
               kernel_sizes=[3, 5], in_channels=[32, 16], out_channels=[16, 24], strides=[1, 2],
               num_block_repeats=[1, 1], expand_ratios=[1, 2], depthwise_padding=[], hidden_dim=64),
]  # fmt: skip


# --- timm ----------------------------------------------------------------------------------------


def vision(name: str, **settings: Any) -> Specimen:
    """A model of timm with the cross-entropy of its classes."""
    targets = ids(BATCH, below=CLASSES)

    def make() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=CLASSES, **settings)

    def loss(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets)

    return Specimen(name, make, {"x": noise(BATCH, 3, SIZE, SIZE)}, BATCH, loss)


def efficientnet() -> Specimen:
    """Depthwise convolutions and squeeze-and-excite; timm's named ones cannot be made this small."""

    def make() -> nn.Module:
        from timm.models._efficientnet_builder import decode_arch_def
        from timm.models.efficientnet import EfficientNet

        blocks = decode_arch_def([["ds_r1_k3_s1_e1_c8_se0.25"], ["ir_r2_k5_s2_e2_c12_se0.25"]])
        return EfficientNet(blocks, num_classes=CLASSES, stem_size=8, num_features=16)

    return replace(vision("efficientnet"), make=make)


def mixer() -> Specimen:
    """As above: the named ones fix their depth."""

    def make() -> nn.Module:
        from timm.models.mlp_mixer import MlpMixer

        return MlpMixer(CLASSES, img_size=SIZE, patch_size=8, num_blocks=2, embed_dim=16)

    return replace(vision("mlp_mixer"), make=make)


TIMM = [
    vision("resnet10t", channels=(8, 8, 12, 12), stem_width=4),
    vision("resnext50_32x4d", layers=(1, 1, 1, 1), channels=(8, 8, 16, 16), cardinality=2, base_width=16),
    vision("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 12, 12)),
    efficientnet(),
    vision("swin_tiny_patch4_window7_224", img_size=SIZE, window_size=4, embed_dim=8, depths=(1, 2),
           num_heads=(2, 4)),
    mixer(),
    vision("vit_tiny_patch16_224", img_size=SIZE, patch_size=8, embed_dim=16, depth=2, num_heads=4),
]  # fmt: skip
