"""Reserved: this portion of headrace comes with the CSI driver."""
