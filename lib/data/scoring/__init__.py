"""Files → answers of a registered model.

plan       which files, which model, where the scores will lie
build      the scores, by actors that hold the task's predictor, published whole
vllm       the same for chat, by vLLM through Ray Data
grounded   the passages of a knowledge base before chat's questions
shards     what is asked of a block's rows, and the shard of their answers
"""
