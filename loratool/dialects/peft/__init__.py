"""The PEFT dialect: ``adapter_model.safetensors`` with ``adapter_config.json``."""
