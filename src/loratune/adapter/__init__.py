"""What LoRA is: configurations, factors, sites, the wrapper, merging, files. Needs torch and safetensors only."""
