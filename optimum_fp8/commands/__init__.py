"""What `optimum-cli fp8 …` runs; its arguments are declared in `optimum/commands/register/register_fp8.py`."""
