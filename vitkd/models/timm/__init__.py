"""Models of timm (Wightman 2019) as models of vitkd's: images and `Taps` in, `Output` out."""
