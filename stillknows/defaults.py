"""What a command means when nothing is said: one place for the library and the command line. Imports nothing."""

METHOD = "robust"
LR = 1e-5
VARIANTS = "full,bf16,int8,nf4,fp4,int4"
DEPLOYED = (  # what "deployed" stands for: how people run models; rtn:grid=full is compressed-tensors' int4
    *("full", "bf16", "fp8", "int8", "nf4", "fp4", "rtn:grid=full", "gptq", "awq", "hqq", "mxfp4", "nvfp4"),
    *(f"gguf:{file}" for file in ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K")),
)
FORMATS = "int8,nf4,fp4,int4,rtn:group=0"
METRICS = "answer_probability,exact_memorisation,extraction_strength,rouge_l"
TOLERANCE = 0.1
UTILITY_FLOOR = 0.9
