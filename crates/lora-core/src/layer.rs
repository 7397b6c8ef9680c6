//! Geometry of the layers that can carry an adapter. No weights here.

/// Shape of an adaptable layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum LayerGeometry {
    /// `y = W x` with `W: [out_features, in_features]`.
    Linear {
        /// Width of the input.
        in_features: usize,
        /// Width of the output.
        out_features: usize,
    },
    /// A 2-D convolution with a square kernel, `W: [out_channels, in_channels / groups, kernel, kernel]`.
    Conv2d {
        /// Input channels.
        in_channels: usize,
        /// Output channels.
        out_channels: usize,
        /// Side of the kernel.
        kernel: usize,
        /// Stride, both ways.
        stride: usize,
        /// Zero padding on each side.
        padding: usize,
        /// Channel groups.
        groups: usize,
    },
    /// A table that row numbers look up, `W: [entries, width]`.
    Embedding {
        /// Number of rows.
        entries: usize,
        /// Width of a row, which is the output's.
        width: usize,
    },
    /// A normalisation with a learnt factor for each feature, `W: [features]`. Only whole differences apply to it.
    Norm {
        /// Number of features.
        features: usize,
    },
    /// The linear layers of a mixture's experts, whose weights are one parameter, `W: [experts, out_features, in_features]`. Only
    /// `lora` applies to it, with factors for each expert.
    Experts {
        /// Number of experts.
        experts: usize,
        /// Width of the input.
        in_features: usize,
        /// Width of the output.
        out_features: usize,
    },
}

impl LayerGeometry {
    /// A linear layer.
    pub fn linear(in_features: usize, out_features: usize) -> Self {
        LayerGeometry::Linear { in_features, out_features }
    }

    /// An ungrouped convolution.
    pub fn conv2d(in_channels: usize, out_channels: usize, kernel: usize, stride: usize, padding: usize) -> Self {
        LayerGeometry::Conv2d { in_channels, out_channels, kernel, stride, padding, groups: 1 }
    }

    /// The geometry that a weight of this shape shows: `[out, in]` a linear layer, `[out, in, k, k]` a convolution
    /// (stride 1, one group: neither shows), `[features]` a normalisation. Others have none.
    pub fn of_weight(shape: &[usize]) -> Option<Self> {
        match *shape {
            [features] => Some(LayerGeometry::Norm { features }),
            [out_features, in_features] => Some(LayerGeometry::linear(in_features, out_features)),
            [outputs, inputs, kernel, width] if kernel == width => {
                Some(LayerGeometry::conv2d(inputs, outputs, kernel, 1, 0))
            }
            _ => None,
        }
    }

    /// Width or channels of the input; an embedding's entries.
    pub fn inputs(&self) -> usize {
        match *self {
            LayerGeometry::Linear { in_features, .. } | LayerGeometry::Experts { in_features, .. } => in_features,
            LayerGeometry::Conv2d { in_channels, .. } => in_channels,
            LayerGeometry::Embedding { entries, .. } => entries,
            LayerGeometry::Norm { features } => features,
        }
    }

    /// Width or channels of the output.
    pub fn outputs(&self) -> usize {
        match *self {
            LayerGeometry::Linear { out_features, .. } | LayerGeometry::Experts { out_features, .. } => out_features,
            LayerGeometry::Conv2d { out_channels, .. } => out_channels,
            LayerGeometry::Embedding { width, .. } => width,
            LayerGeometry::Norm { features } => features,
        }
    }

    /// Numbers of the weight behind one output.
    pub fn fan_in(&self) -> usize {
        match *self {
            LayerGeometry::Linear { in_features, .. } | LayerGeometry::Experts { in_features, .. } => in_features,
            LayerGeometry::Conv2d { in_channels, kernel, groups, .. } => in_channels / groups * kernel * kernel,
            LayerGeometry::Embedding { entries, .. } => entries,
            LayerGeometry::Norm { .. } => 1,
        }
    }

    /// Shape of the weight.
    pub fn weight_shape(&self) -> Vec<usize> {
        match *self {
            LayerGeometry::Linear { in_features, out_features } => vec![out_features, in_features],
            LayerGeometry::Conv2d { in_channels, out_channels, kernel, groups, .. } => {
                vec![out_channels, in_channels / groups, kernel, kernel]
            }
            LayerGeometry::Embedding { entries, width } => vec![entries, width],
            LayerGeometry::Norm { features } => vec![features],
            LayerGeometry::Experts { experts, in_features, out_features } => vec![experts, out_features, in_features],
        }
    }

    /// Whether it is a convolution with a kernel larger than 1×1.
    pub fn is_spatial(&self) -> bool {
        matches!(self, LayerGeometry::Conv2d { kernel, .. } if *kernel > 1)
    }

    /// The same layer with another number of outputs: the shape of a LoRA's down-projection.
    #[must_use]
    pub fn with_outputs(self, outputs: usize) -> Self {
        match self {
            LayerGeometry::Linear { in_features, .. } => LayerGeometry::linear(in_features, outputs),
            LayerGeometry::Conv2d { in_channels, kernel, stride, padding, groups, .. } => {
                LayerGeometry::Conv2d { in_channels, out_channels: outputs, kernel, stride, padding, groups }
            }
            LayerGeometry::Embedding { entries, .. } => LayerGeometry::Embedding { entries, width: outputs },
            LayerGeometry::Norm { .. } => LayerGeometry::Norm { features: outputs },
            LayerGeometry::Experts { experts, in_features, .. } => {
                LayerGeometry::Experts { experts, in_features, out_features: outputs }
            }
        }
    }

    /// The layer that mixes `inputs` channels into this layer's outputs, position by position: the shape of a LoRA's
    /// up-projection.
    #[must_use]
    pub fn pointwise_from(self, inputs: usize) -> Self {
        match self {
            LayerGeometry::Conv2d { out_channels, .. } => LayerGeometry::conv2d(inputs, out_channels, 1, 1, 0),
            LayerGeometry::Experts { experts, out_features, .. } => {
                LayerGeometry::Experts { experts, in_features: inputs, out_features }
            }
            _ => LayerGeometry::linear(inputs, self.outputs()),
        }
    }
}
