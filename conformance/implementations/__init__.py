"""Bundled adapters by name: where each lives, and what it is. Imported when asked for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bundled:
    """A bundled adapter."""

    name: str
    target: str
    """``module:attribute``; the attribute is called without arguments if it is a class."""
    summary: str


def _bundled(name: str, target: str, summary: str) -> Bundled:
    return Bundled(name, f"{__name__}.{target}", summary)


BUNDLED: dict[str, Bundled] = {
    adapter.name: adapter
    for adapter in (
        _bundled("reference", "reference:Reference", "the executable specification itself"),
        _bundled(
            "torch-sdpa",
            "torch_sdpa:TorchSDPA",
            "torch's scaled_dot_product_attention, the kernel chosen by torch",
        ),
        _bundled(
            "torch-sdpa-math", "torch_sdpa:TorchSDPAMath", "the same, by the unfused kernel alone"
        ),
        _bundled(
            "torch-sdpa-flash", "torch_sdpa:TorchSDPAFlash", "the same, by the flash kernel alone"
        ),
        _bundled(
            "torch-sdpa-efficient",
            "torch_sdpa:TorchSDPAEfficient",
            "the same, by the memory-efficient kernel alone (CUDA)",
        ),
        _bundled(
            "torch-sdpa-cudnn",
            "torch_sdpa:TorchSDPACudnn",
            "the same, by cuDNN's kernel alone (CUDA)",
        ),
        _bundled("torch-flex", "torch_flex:TorchFlex", "torch's FlexAttention, uncompiled"),
        _bundled(
            "torch-flex-compiled",
            "torch_flex:TorchFlexCompiled",
            "torch's FlexAttention, compiled by inductor",
        ),
        _bundled(
            "torch-load",
            "torch_checkpoint:TorchCheckpoint",
            "checkpoints by torch.load and a strict load_state_dict",
        ),
        _bundled(
            "torch-dtensor",
            "torch_dtensor:TorchDTensor",
            "parallel layers by torch's parallelize_module and DTensor",
        ),
        _bundled(
            "torch-fsdp2",
            "torch_fsdp2:TorchFSDP2",
            "sharded models by torch's fully_shard and distributed checkpoints",
        ),
        _bundled(
            "transformers-loader",
            "transformers_loader:TransformersLoader",
            "weights of a directory by transformers' from_pretrained",
        ),
        _bundled(
            "transformers-loader-checked",
            "transformers_loader:TransformersLoaderChecked",
            "the same, and whatever its report names raises",
        ),
        _bundled(
            "transformers-qwen2",
            "transformers_lm:TransformersQwen2",
            "transformers' Qwen2ForCausalLM, with its own tensor parallelism",
        ),
        _bundled(
            "torch-experts-grouped",
            "grouped_experts:TorchGroupedExperts",
            "experts sorted, in torch's grouped_mm",
        ),
        _bundled(
            "torch-folded-experts",
            "grouped_experts:FoldedGroupedExperts",
            "a block of compressed experts: each core once a token, the rest in torch's grouped_mm",
        ),
        _bundled(
            "torch-kernels",
            "torch_kernels:TorchKernels",
            "torch-sdpa and torch-experts-grouped in one",
        ),
        _bundled(
            "transformers-experts-eager",
            "transformers_experts:TransformersEagerExperts",
            "transformers' Qwen3-MoE experts, one after another",
        ),
        _bundled(
            "transformers-experts-batched",
            "transformers_experts:TransformersBatchedExperts",
            "the same with experts_implementation='batched_mm'",
        ),
        _bundled(
            "transformers-experts-grouped",
            "transformers_experts:TransformersGroupedExperts",
            "the same with experts_implementation='grouped_mm'",
        ),
        _bundled(
            "transformers-experts-llama4",
            "transformers_experts:TransformersLlama4Experts",
            "transformers' Llama 4 experts: transposed, weights on the input",
        ),
        _bundled(
            "transformers-qwen3-moe",
            "transformers_moe_routers:TransformersQwen3MoE",
            "transformers' Qwen3-MoE router, block and balancing loss",
        ),
        _bundled(
            "transformers-qwen2-moe",
            "transformers_moe_routers:TransformersQwen2MoE",
            "transformers' Qwen2-MoE router, and block with a gated shared expert",
        ),
        _bundled(
            "transformers-mixtral",
            "transformers_moe_routers:TransformersMixtral",
            "transformers' Mixtral router, block and balancing loss",
        ),
        _bundled(
            "transformers-deepseek-v3",
            "transformers_moe_routers:TransformersDeepseekV3",
            "transformers' DeepSeek-V3 router with bias and groups, and its block",
        ),
        _bundled(
            "transformers-eager",
            "transformers_attention:TransformersEager",
            "transformers' eager attention, masks, rotary embeddings and cache",
        ),
        _bundled(
            "transformers-sdpa",
            "transformers_attention:TransformersSDPA",
            "transformers with attn_implementation='sdpa'",
        ),
        _bundled(
            "transformers-flex",
            "transformers_attention:TransformersFlex",
            "transformers with attn_implementation='flex_attention'",
        ),
        _bundled(
            "trl-gkd",
            "trl_distillation:TRLGKD",
            "TRL's generalized_jsd_loss, as its GKD trainer calls it",
        ),
        _bundled(
            "torch-kl-div",
            "torch_distillation:TorchKLDiv",
            "torch's kl_div and cross_entropy of valid tokens, as its tutorial has them",
        ),
        _bundled(
            "transformers-loss",
            "transformers_loss:TransformersLoss",
            "transformers' ForCausalLMLoss: the cross entropy alone",
        ),
        _bundled(
            "lm-eval-hflm",
            "lm_eval_hflm:LMEvalHFLM",
            "log likelihoods by HFLM of lm-evaluation-harness, with its defaults",
        ),
        _bundled(
            "lm-eval-hflm-float32",
            "lm_eval_hflm:LMEvalHFLMFloat32",
            "the same with a log-softmax in float32",
        ),
        _bundled(
            "transformers-loss-scorer",
            "transformers_likelihood:TransformersLossScorer",
            "the loss of transformers' causal language models as a score of each request alone",
        ),
    )
}
