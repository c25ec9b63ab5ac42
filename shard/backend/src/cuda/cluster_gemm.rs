//! Products of up to 128 rows on Hopper, by clusters of blocks: `cluster_gemm.cu`.

use std::collections::HashMap;
use std::sync::Arc;

use cudarc::driver::sys;

use super::driver::{Context, DevicePtr};
use super::launch::{Argument, Launch, Queue, args};
use super::matmul::{Task, out_type};
use super::module::{Function, Module};
use super::tensor_map::Boxes;
use super::{CudaLinear, DeviceFacts};
use crate::{BackendError, DType};

/// Elements of a row in one bulk copy, 128 bytes.
const BOX_COLUMNS: usize = 64;
const BOX_ROW_BYTES: usize = 128;
/// Most weight rows of a warpgroup.
const GROUP_ROWS: usize = 64;
/// Most stages of a ring.
const MOST_STAGES: usize = 12;
/// Most bytes of a block's shared memory, so that two have room on a multiprocessor beside what the driver keeps.
const BLOCK_BYTES: usize = (227 << 9) - 1536;
/// Descriptions of matrices that are kept.
const MAX_MAPS: usize = 1 << 14;

/// How a product is shared out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClusterPlan {
    /// Rows of `x` it is compiled for.
    pub tokens: usize,
    /// Warpgroups of a block.
    pub groups: usize,
    /// Weight rows of a warpgroup, a multiple of 8.
    pub group_rows: usize,
    /// Blocks that share K.
    pub split: usize,
    /// Blocks with other weight rows that get `x` together.
    pub share: usize,
    /// Stages of the ring.
    pub stages: usize,
    /// Stages before the end the next kernel may start.
    pub early: usize,
}

/// `ClusterGemm` of cluster_gemm.cu.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Parameters {
    out: DevicePtr,
    bias: DevicePtr,
    rows: i32,
    inputs: i32,
    out_type: i32,
    activation: i32,
    outputs: i32,
    group_rows: i32,
    split: i32,
    share: i32,
    stages: i32,
    early: i32,
}

impl Argument for Parameters {}

/// Rows of `x` and warpgroups of the instantiations.
const SHAPES: [(usize, usize); 7] = [(16, 1), (32, 1), (32, 2), (64, 1), (64, 2), (128, 1), (128, 2)];
const GATED: [(usize, usize); 4] = [(16, 2), (32, 2), (64, 2), (128, 2)];

/// A kernel for bf16 and for f16, by rows of `x` and warpgroups.
type Kernels = HashMap<(usize, usize), [Function; 2]>;

impl ClusterPlan {
    /// With as many stages as there is room for.
    fn fill_ring(mut self) -> Self {
        let block = std::env::var("QX_RING").ok().map_or(BLOCK_BYTES, |x| x.parse::<usize>().unwrap() << 10);
        if self.stages == 0 {
            self.stages = ((block - self.beside_ring()) / self.stage_bytes()).min(MOST_STAGES);
        }
        self
    }

    fn stage_bytes(self) -> usize {
        (self.groups * self.group_rows + self.tokens) * BOX_ROW_BYTES
    }

    /// The ring begins at a multiple of 1024, and products of fewer than 64 rows read past its end.
    fn beside_ring(self) -> usize {
        1024 + GROUP_ROWS.saturating_sub(self.group_rows + self.tokens) * BOX_ROW_BYTES
    }

    fn shared_bytes(self) -> usize {
        // Sums of all warpgroups take the place of the ring.
        let sums = self.tokens * self.groups * 128 * 2;
        (self.stages * self.stage_bytes()).max(sums) + self.beside_ring()
    }

    /// What `weight` times `rows` rows takes; `outputs`: rows of the weight, or of its gates.
    fn of(rows: usize, outputs: usize, is_gated: bool, num_sms: usize) -> Option<Self> {
        let tokens = [16, 32, 64, 128].into_iter().find(|&tokens| tokens >= rows)?;
        let groups = if is_gated { 2 } else { 1 };
        let split = if is_gated || outputs >= num_sms * 40 { 1 } else { 2 };
        let even = (outputs * split).div_ceil(num_sms / 4 * 4);
        let group_rows = if even > 32 { 64 } else { 32 };
        let plan = Self { tokens, groups, group_rows, split, share: 1, stages: 0, early: 1 };
        Some(plan.fill_ring())
    }
}

/// The kernels.
pub(super) struct ClusterGemms {
    plain: Kernels,
    gated: Kernels,
    num_sms: usize,
    maps: HashMap<Boxes, sys::CUtensorMap>,
}

impl ClusterGemms {
    /// Loads them; none where the GPU is no Hopper or the program has no kernels for it.
    pub(super) fn load(context: &Arc<Context>, facts: DeviceFacts) -> Result<Option<Self>, BackendError> {
        if facts.capability != (9, 0) || !kernels::architectures().contains(&"sm_90a") {
            return Ok(None);
        }
        let module = Module::load(context, "cluster_gemm")?;
        let load = |name: &str, shapes: &[(usize, usize)]| {
            let find = |tokens: usize, groups: usize, dtype: &str| -> Result<Function, BackendError> {
                let function = module.function(&format!("{name}_{tokens}_{groups}_{dtype}"))?;
                function.allow_shared_memory(200 << 10)?;
                Ok(function)
            };
            shapes
                .iter()
                .map(|&(tokens, groups)| {
                    Ok(((tokens, groups), [find(tokens, groups, "bf16")?, find(tokens, groups, "f16")?]))
                })
                .collect::<Result<Kernels, BackendError>>()
        };
        let (plain, gated) = (load("cluster", &SHAPES)?, load("cluster_gated", &GATED)?);
        Ok(Some(Self { plain, gated, num_sms: facts.num_sms, maps: HashMap::new() }))
    }

    /// How a product is computed so: 16-bit elements in rows that bulk copies can take; none: it is for others.
    pub(super) fn plan(&self, task: Task<'_>, is_gated: bool) -> Option<ClusterPlan> {
        let weight = task.weight;
        let outputs = if is_gated { weight.out_features / 2 } else { weight.out_features };
        let fits = weight.dtype != DType::F32
            && (task.out_dtype == DType::F32 || task.out_dtype == weight.dtype)
            && weight.in_features.is_multiple_of(8)
            && task.rows > 0;
        if !fits {
            return None;
        }
        let plan = ClusterPlan::of(task.rows, outputs, is_gated, self.num_sms)?;
        Some(experiment(plan, weight))
    }

    /// `out = x weight^T (+ bias)`; with an activation `activation(gate) * up` of the product's halves.
    pub(super) fn multiply(
        &mut self,
        queue: &Queue,
        plan: ClusterPlan,
        task: Task<'_>,
        activation: Option<i32>,
    ) -> Result<(), BackendError> {
        let kernels = if activation.is_some() { &self.gated } else { &self.plain };
        let Some(functions) = kernels.get(&(plan.tokens, plan.groups)) else {
            return Err(BackendError::Device {
                operation: "a product by clusters".to_owned(),
                reason: format!("{plan:?} was not compiled"),
            });
        };
        let function = functions[usize::from(task.weight.dtype != DType::BF16)];
        let halves = if activation.is_some() { 2 } else { 1 };
        let outputs = task.weight.out_features / halves;
        let tiles = outputs.div_ceil(plan.groups / halves * plan.group_rows);
        let cluster = plan.split * plan.share;
        let launch = Launch {
            function,
            grid: [(tiles.div_ceil(plan.share) * cluster) as u32, 1, 1],
            block: (plan.groups * 128 + 32) as u32,
            shared_bytes: plan.shared_bytes() as u32,
        };
        let (weights, x) = self.maps_of(plan, task)?;
        let parameters = Parameters {
            out: task.out,
            bias: task.bias,
            rows: task.rows as i32,
            inputs: task.weight.in_features as i32,
            out_type: out_type(task.out_dtype),
            activation: activation.unwrap_or(0),
            outputs: outputs as i32,
            group_rows: plan.group_rows as i32,
            split: plan.split as i32,
            share: plan.share as i32,
            stages: plan.stages as i32,
            early: plan.early as i32,
        };
        queue.launch_clusters(&launch, cluster as u32, args![weights, x, parameters])
    }

    /// The descriptions of weights and activations.
    fn maps_of(
        &mut self,
        plan: ClusterPlan,
        task: Task<'_>,
    ) -> Result<(sys::CUtensorMap, sys::CUtensorMap), BackendError> {
        let CudaLinear { dtype, out_features, in_features, row_stride, .. } = *task.weight;
        let weights = self.map(Boxes {
            address: task.weight.ptr(),
            dtype,
            rows: out_features,
            columns: in_features,
            row_bytes: row_stride * 2,
            box_size: [plan.group_rows, BOX_COLUMNS],
        })?;
        let x = self.map(Boxes {
            address: task.x,
            dtype,
            rows: task.rows,
            columns: in_features,
            row_bytes: in_features * 2,
            box_size: [plan.tokens / plan.share, BOX_COLUMNS],
        })?;
        Ok((weights, x))
    }

    /// The description of a matrix of 16-bit elements, which the copy engine needs.
    fn map(&mut self, key: Boxes) -> Result<sys::CUtensorMap, BackendError> {
        if let Some(map) = self.maps.get(&key) {
            return Ok(*map);
        }
        if self.maps.len() >= MAX_MAPS {
            self.maps.clear();
        }
        let map = key.map()?;
        self.maps.insert(key, map);
        Ok(map)
    }
}

/// EXPERIMENT
fn experiment(mut plan: ClusterPlan, weight: &CudaLinear) -> ClusterPlan {
    let name = format!("QX_{}x{}_{}", weight.out_features, weight.in_features, plan.tokens);
    if let Some(text) = std::env::var(name).ok().or_else(|| std::env::var("QX_ALL").ok()) {
        for item in text.split(',') {
            let (key, value) = item.split_at(1);
            let value: usize = value.parse().unwrap();
            match key {
                "g" => plan.groups = value,
                "r" => plan.group_rows = value,
                "c" => plan.split = value,
                "m" => plan.share = value,
                "s" => plan.stages = value,
                "e" => plan.early = value,
                _ => panic!("{item}"),
            }
            if "gr".contains(key) {
                plan.stages = 0;
            }
        }
    }
    plan.fill_ring()
}
