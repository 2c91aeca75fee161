"""Speed and memory, ours and the peers', measured by one command each; README.md beside this file says how."""
