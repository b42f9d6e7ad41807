import { pageDescription } from './page/blocks'
import { tracePage } from './trace/page'

const VIEWS: Record<string, () => Promise<void>> = { trace: tracePage }

const { view } = pageDescription()
const show = VIEWS[view]
if (!show) throw new Error(`expected a view of ${Object.keys(VIEWS).join(', ')}; got ${view}`)
void show()
