//! Geometry of the layers that can carry an adapter. No weights here.

/// Shape and geometry of a frozen layer `y = W x + b`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum LayerGeometry {
    /// A linear layer, weight `[out_features, in_features]`.
    Linear {
        /// Width of the input.
        in_features: usize,
        /// Width of the output.
        out_features: usize,
    },
    /// A two-dimensional convolution, weight `[out_channels, in_channels / groups, kernel, kernel]`.
    Conv2d {
        /// Channels of the input.
        in_channels: usize,
        /// Channels of the output.
        out_channels: usize,
        /// Side of the square kernel.
        kernel: usize,
        /// Stride in both directions.
        stride: usize,
        /// Zero padding on all four sides.
        padding: usize,
        /// Channel groups.
        groups: usize,
    },
}

impl LayerGeometry {
    /// A linear layer.
    pub fn linear(in_features: usize, out_features: usize) -> Self {
        LayerGeometry::Linear { in_features, out_features }
    }

    /// A convolution with one group.
    pub fn conv2d(in_channels: usize, out_channels: usize, kernel: usize, stride: usize, padding: usize) -> Self {
        LayerGeometry::Conv2d { in_channels, out_channels, kernel, stride, padding, groups: 1 }
    }

    /// Input width or channels.
    pub fn inputs(&self) -> usize {
        match *self {
            LayerGeometry::Linear { in_features, .. } => in_features,
            LayerGeometry::Conv2d { in_channels, .. } => in_channels,
        }
    }

    /// Output width or channels.
    pub fn outputs(&self) -> usize {
        match *self {
            LayerGeometry::Linear { out_features, .. } => out_features,
            LayerGeometry::Conv2d { out_channels, .. } => out_channels,
        }
    }

    /// Inputs of one output element: the width of the weight seen as a matrix `[outputs, fan_in]`.
    pub fn fan_in(&self) -> usize {
        match *self {
            LayerGeometry::Linear { in_features, .. } => in_features,
            LayerGeometry::Conv2d { in_channels, kernel, groups, .. } => in_channels / groups * kernel * kernel,
        }
    }

    /// Shape of the weight.
    pub fn weight_shape(&self) -> Vec<usize> {
        match *self {
            LayerGeometry::Linear { in_features, out_features } => vec![out_features, in_features],
            LayerGeometry::Conv2d { in_channels, out_channels, kernel, groups, .. } => {
                vec![out_channels, in_channels / groups, kernel, kernel]
            }
        }
    }

    /// Whether this is a convolution with a kernel larger than 1×1.
    pub fn is_spatial(&self) -> bool {
        matches!(self, LayerGeometry::Conv2d { kernel, .. } if *kernel > 1)
    }

    /// The same input and kernel with another number of outputs (LoRA's down-projection).
    #[must_use]
    pub fn with_outputs(self, outputs: usize) -> Self {
        match self {
            LayerGeometry::Linear { in_features, .. } => LayerGeometry::linear(in_features, outputs),
            LayerGeometry::Conv2d { in_channels, kernel, stride, padding, groups, .. } => {
                LayerGeometry::Conv2d { in_channels, out_channels: outputs, kernel, stride, padding, groups }
            }
        }
    }

    /// A layer of the same kind that mixes `inputs` into this layer's outputs at each position (LoRA's up-projection).
    #[must_use]
    pub fn pointwise_from(self, inputs: usize) -> Self {
        match self {
            LayerGeometry::Linear { out_features, .. } => LayerGeometry::linear(inputs, out_features),
            LayerGeometry::Conv2d { out_channels, .. } => LayerGeometry::conv2d(inputs, out_channels, 1, 1, 0),
        }
    }
}
