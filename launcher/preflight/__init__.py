"""What `flglm check` looks at before a role is started. Nothing is written, nothing that runs is disturbed."""
