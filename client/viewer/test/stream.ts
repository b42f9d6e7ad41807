import type { EdgeMessage, NodeMessage, TraceResponse } from '../src/contract'

const TEXTS = [' of', ' Tokyo', ' Paris', '<b>', ' Kyoto']

/** A layer of two heads and two neurons whose shares and logits are easy to follow. */
export function stream(): TraceResponse[] {
  return [
    {
      header: {
        promptTokens: [{ text: 'The' }, { id: 0, text: ' of' }],
        layers: [0],
        targets: [{ position: 1, targetTokenId: 1, predictedTokenId: 1 }],
        tokens: [{ id: 1, text: ' Tokyo' }],
        sizes: { nLayers: 1, nHeads: 4, dMlp: 16, vocabSize: 100 },
      },
    },
    { layer: { tokens: TEXTS.map((text, id) => ({ id, text })), nodes: NODES, edges: EDGES } },
    { summary: { nodes: NODES.length, edges: EDGES.length } },
  ]
}

const NODES: NodeMessage[] = [
  node('p1/BLOCK_INPUT', 'BLOCK_INPUT', [0, 2], 40),
  node('L0/p1/HEAD_OUTPUT/h0', 'HEAD_OUTPUT', [2], 7, { head: 0 }),
  node('L0/p1/HEAD_OUTPUT/h3', 'HEAD_OUTPUT', [1], 0, { head: 3 }),
  node('L0/p1/MEMORY_KEY/h3/s0', 'MEMORY_KEY', [3], 50, { head: 3, sourcePosition: 0 }),
  node('L0/p1/MEMORY_VALUE/h3/s0', 'MEMORY_VALUE', [1], 0, { head: 3, sourcePosition: 0 }),
  { ...node('L0/p1/ATTENTION_CONCAT', 'ATTENTION_CONCAT', [], 0), projection: {} },
  node('L0/p1/ATTENTION_OUTPUT', 'ATTENTION_OUTPUT', [1], 1),
  node('L0/p1/RESIDUAL_MID', 'RESIDUAL_MID', [1], 0),
  node('L0/p1/MLP_VALUE/n5', 'MLP_VALUE', [4], 30, { neuron: 5, activation: 2 }),
  node('L0/p1/MLP_VALUE/n9', 'MLP_VALUE', [2], 99, { neuron: 9, activation: -0.5 }),
  node('L0/p1/MLP_OUTPUT', 'MLP_OUTPUT', [4], 3),
  node('L0/p1/BLOCK_OUTPUT', 'BLOCK_OUTPUT', [1, 4], 0),
]

const EDGES: EdgeMessage[] = [
  part('L0/p1/MEMORY_VALUE/h3/s0', 'L0/p1/HEAD_OUTPUT/h3', 0.9, 2.5, 0.8),
  { ...edge('L0/p1/MEMORY_KEY/h3/s0', 'L0/p1/MEMORY_VALUE/h3/s0', 'RECALL'), weight: 0.8 },
  part('L0/p1/HEAD_OUTPUT/h0', 'L0/p1/ATTENTION_CONCAT', 0.3, 0.5),
  part('L0/p1/HEAD_OUTPUT/h3', 'L0/p1/ATTENTION_CONCAT', 0.7, 2.75),
  part('p1/BLOCK_INPUT', 'L0/p1/RESIDUAL_MID', 0.4, 0.1),
  part('L0/p1/ATTENTION_OUTPUT', 'L0/p1/RESIDUAL_MID', 0.6, 3.25),
  part('L0/p1/MLP_VALUE/n5', 'L0/p1/MLP_OUTPUT', 1.2, -0.2),
  part('L0/p1/MLP_VALUE/n9', 'L0/p1/MLP_OUTPUT', -0.2, 0.4),
  part('L0/p1/RESIDUAL_MID', 'L0/p1/BLOCK_OUTPUT', 0.75, 3.35),
  part('L0/p1/MLP_OUTPUT', 'L0/p1/BLOCK_OUTPUT', 0.25, 0.2),
]

function node(
  id: string,
  kind: string,
  tops: number[],
  rank: number,
  more: Partial<NodeMessage> = {},
): NodeMessage {
  const layer = id.startsWith('L') ? { layer: 0 } : {}
  const ids = { topTokenIds: tops, topProbabilities: tops.map(() => 0.5), targetRank: rank }
  const projection = { ...ids, topLogits: tops.map(() => 1) }
  return { id, kind: `NODE_KIND_${kind}`, position: 1, ...layer, norm: 2, projection, ...more }
}

function edge(source: string, target: string, kind: string): EdgeMessage {
  return { source, target, kind: `EDGE_KIND_${kind}` }
}

function part(
  source: string,
  target: string,
  share: number,
  logitContribution: number,
  attention?: number,
): EdgeMessage {
  const given = attention === undefined ? {} : { attention }
  return { ...edge(source, target, 'PART'), share, logitContribution, ...given }
}
