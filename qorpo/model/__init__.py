"""A causal language model made ready: loaded, quantized, adapted, attending to packed rows, checked, checkpointed.

May import `ops`, `data` and `errors`; knows no recipe. Begin with `scoring.py` (a packed row in, log-probabilities out).

What qorpo changes on objects of other libraries, and why. Each change is on the loaded instance unless it says otherwise:

| where | what changes | why |
|---|---|---|
| `load.keep_nf4_trainable` | `support_avx512bf16_for_cpu = False` on each `Linear4bit` | bitsandbytes repacks weights in evaluation; a later training forward would run a kernel without gradients |
| `nf4.fix_dequantization` | bitsandbytes' CPU kernel for NF4, in the whole process | rows that are no multiple of 64 long are dequantized wrongly on AVX-512 |
| `nf4.quantized_on_gpu` | `Params4bit._quantize`, while a model loads | a base that is to be sharded waits in host memory; quantizing it there takes hours |
| `nf4.keep_quant_states` | `quant_state` on each `Linear4bit` | FSDP2's sharded weights lose it |
| `adapters.compute_in_base_type` | `forward` of LoRA layers; the class of their small matrices and of modules that train | PEFT casts each wide activation to float32; here the narrow side is cast, and the sum is made in place |
| `attention.packed_attention` | an entry in transformers' `AttentionInterface` and its mask function, in the whole process | each prompt is attended to once by all its responses |
| `liger.apply_liger` | norms, rotary embedding and MLPs of the instance | fused kernels; liger's own route would change every later model of the family |
| `checkpointing.checkpoint_layers` | `forward` of decoder layers | the same in every version of transformers; its own route drops checkpointing on some |
| `mixed_precision.computed_in` | parameters, while a step runs | float32 weights train, their bfloat16 casts compute |
"""
