"""What a job will cost, before it has a machine: the plan, the dry run, the paper's figures."""
