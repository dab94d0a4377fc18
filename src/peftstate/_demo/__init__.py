"""What `peftstate demo` runs: plain PEFT's reloads and ours, beside the model that was saved."""
