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
| `targets.targets_as_given` | PEFT's table of renamed experts, while an adapter is attached or opened | PEFT takes a shared expert's layers for experts of before transformers 5, and leaves their adapters out |
| `adapters.compute_in_base_type`, on experts in 4 bits | `forward` and `get_param` of PEFT's `ParamWrapper` | its own leaves one more parametrization a forward, and unpacks experts into a cache without their LoRA |
| `quantizer.qorpos_quantizer` | transformers' quantizer for bitsandbytes, while a model loads | it quantizes vision towers and routers, and leaves stacked experts in 16 bits |
| `quantizer.experts_plain` | the class and parameters of packed experts, while an adapter is attached or opened | PEFT nests its wrappers in another order around packed parameters |
| `attention.packed_attention` | an entry in transformers' `AttentionInterface` and its mask function, in the whole process | each prompt is attended to once by all its responses |
| `liger.apply_liger` | norms, rotary embedding and MLPs of the instance | fused kernels; liger's own route would change every later model of the family |
| `checkpointing.checkpoint_layers` | `forward` of decoder layers | the same in every version of transformers; its own route drops checkpointing on some |
| `mixed_precision.computed_in` | parameters, while a step runs | float32 weights train, their bfloat16 casts compute |
"""
