"""Reserved: this portion of headrace comes with the node agent."""
