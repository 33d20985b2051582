"""The hospital's side of a deployment: its rules, its approvals, its client."""
