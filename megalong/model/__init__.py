"""The LongNet model: Megatron-core's GPTModel with dilated attention in its layers."""
