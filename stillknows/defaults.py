"""What a command means when nothing is said: one place for the library and the command line. Imports nothing."""

METHOD = "npo + kl"
VARIANTS = "full,bf16,int8,nf4,fp4,int4"
METRICS = "answer_probability,exact_memorisation,extraction_strength,rouge_l"
TOLERANCE = 0.1
UTILITY_FLOOR = 0.9
