"""What a job config may say: types, choices, and ranges of every key, TorchTitan's and ours."""
